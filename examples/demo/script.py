"""The demo's messages: one long conversation, and two other readers who compete for DRAM.

The conversation reads a short book, one chapter per turn, and ends with a question about all of it.
The first message of each other reader is the whole book. They ask a question between some turns:
the daemon promotes their blocks to DRAM, and evicts the conversation's blocks to SSD.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Message = dict[str, str]

SYSTEM = "You are a patient librarian. Answer in a few plain sentences, and only from the text that you have."

_CHAPTERS = (
    """The island of Harrow lies nine miles off the coast and has one railway. It was built in 1887 by a
    company that hoped to carry slate from the quarries in the north to the harbour in the south. The slate
    ran out within twenty years, but the railway stayed, because by then everybody on the island had grown
    used to it. The line is eleven miles long and has five stations: Harbour, Mill Lane, Upper Cross, The
    Heath, and Quarry End. There is a single track, with one place in the middle, at Upper Cross, where two
    trains can pass each other. The engines are small and painted dark green. Each of them carries the name
    of a sea bird: Gannet, Petrel, Tern and Shearwater. A fifth engine, Puffin, fell into the harbour in the
    winter of 1911 and was never raised. At very low tides its chimney can still be seen, and children are
    told that the engine is waiting there for the right signal.""",
    """The first stationmaster at Upper Cross was Agnes Mallory, a widow who had kept the toll gate on the
    road before the railway came. She was paid less than the men at the other stations, and she answered this
    by keeping better books than any of them. Every train, every passenger, every crate of fish and every
    late minute was written down in her small square hand. Her ledgers fill a whole shelf in the museum.
    From them we know that on the fourth of March 1892 a train waited at Upper Cross for two hours because a
    swan had sat down between the rails, and that in the same week a piano was sent to The Heath and came
    back the next day, because it did not fit through any door. She retired in 1920, after thirty-three
    years, and handed the keys to her niece Clara, who changed nothing but the colour of the flower pots.""",
    """In 1926 the company bought a steam crane, which was to be the pride of the harbour. It could lift six
    tons and turn in a full circle. The man who drove it, Tobias Reed, had learned his trade in a shipyard on
    the mainland, and did not think much of islands. For the first year he complained of the food, of the
    weather and of the fog horn. In the second year he married the baker's daughter, and after that he
    complained only of the fog horn. The crane loaded wool, cider and barrels of salted fish, and unloaded
    coal, glass and newspapers that were always three days old. When the harbour wall broke in the great
    storm of 1931, Reed kept the crane working for thirty hours, setting blocks of stone into the gap while
    the waves went over the cab. The wall held. A brass plate with his name is screwed to the crane, although
    he always said that it was the crane that deserved it.""",
    """The school on The Heath had forty pupils at its largest and seven at its smallest. For most of its
    history it stood directly beside the line, and lessons stopped twice in the morning and twice in the
    afternoon while the train went by. Miss Orla Finch, who taught there from 1935 to 1961, turned this to
    good use. She had the children count the wagons, guess their weight, and work out how long the train
    would take to Quarry End at the speed they had measured between two fence posts. Several of her pupils
    became engineers. One of them, Daniel Voss, later designed bridges in four countries, and said that he
    had never met a harder examination than the ten past ten goods train. When the school closed, the
    building became a tea room, and the two fence posts were painted white so that visitors can still find
    them and take the measurement for themselves.""",
    """During the second war the island had a garrison of two hundred men, and the railway carried them and
    everything they ate. The engines were painted grey, the station signs were taken down, and the lamps were
    covered with blue paper. It was not clear how an invader who had reached the island might be confused
    by the lack of five signs, when there was only one railway line to follow. In 1943 a small aircraft ran
    out of fuel and landed on the straight stretch north of Mill Lane, between two trains. Its pilot, a young
    woman named Ruth Adler, walked to the station, asked for the timetable, and worked out that she had
    twenty-five minutes to get the aircraft off the rails. With the help of the station staff and a team of
    horses it took her nineteen. She returned after the war, and for many years she flew the mail from the
    mainland every Tuesday and Friday.""",
    """By 1958 there were three motor lorries on the island, and the railway began to lose money. The company
    proposed to close the line north of Upper Cross. A meeting was held in the church hall, and it lasted
    until two in the morning. The farmers said that the lorries could not climb the hill to Quarry End in
    winter. The doctor said that the train was the only ambulance that had never been late. In the end it was
    Clara Mallory who settled the matter. She brought her aunt's ledgers, and read from them, year by year,
    what the line had earned and what it had cost, and showed that it had lost money in every single year
    since 1909. Since it had always lost money, she said, losing money could not be a reason to close it now.
    The islanders formed a society, bought the line for one pound, and have run it themselves ever since, with
    volunteers on every train but the first one in the morning.""",
    """The fog horn of Harrow stood at the end of the harbour wall and was worked by compressed air from the engine
    shed. It could be heard nine miles away, and everybody within one mile of it had to stop talking. In thick
    weather it sounded every ninety seconds, for as long as the fog lasted, and in November 1962 the fog lasted
    six days. On the fifth day the shed ran out of coal for the compressor. The keeper, Samuel Pruett, asked the
    railway for help, and the driver of Tern brought her down to the harbour, connected her brake pump to the
    horn with a length of fire hose, and kept it sounding through the night. Two fishing boats found their way in
    by it. In the morning the hose burst, the fog lifted, and both men fell asleep on the footplate. A note in the
    ledger says that Tern was entered that week as a musical instrument, at the request of the tax office, and
    that the tax on musical instruments turned out to be lower.""",
    """The engine Petrel has the best known history of the four. She was the first to arrive, in pieces, on the
    deck of a coal ship, and was put together on the beach by six men with a drawing that belonged to another
    engine. This is why her whistle is on the left side and why her cab is two inches higher than the doors of
    the shed. In 1974 she was taken apart again, this time on purpose, and it took the volunteers eleven years
    to find out how she had ever worked. They had to make four hundred new parts. The boiler alone cost more
    than the whole railway had cost in 1887, and was paid for with jam, raffle tickets and a sponsored swim
    around the harbour. On the first of May 1985 she ran again from Harbour to Quarry End. She was eleven
    minutes late, and the guard wrote into the ledger, in a small square hand, that no complaint had been
    received from anybody.""",
    """Today the railway carries about thirty thousand visitors a year, and still, on every weekday at ten past
    ten, one goods train. It brings flour, paint and parcels up to The Heath, and it takes back cheese and the
    glass that the workshop at Quarry End makes from old bottles. The museum in the harbour is open from April
    to October. Its most valued piece is not an engine but a signal lamp with a cracked green glass, which is
    said to have been lit on every night since the line was opened, apart from the years of the war. The
    society has one paid worker, a fitter named Ines Calloway, and ninety volunteers between fourteen and
    eighty-eight years of age. A new engine is being built in the shed. It will burn no coal, and will take
    its power from the wind on The Heath. Its name was chosen by the children of the island, who voted almost
    with one voice to call it Puffin.""",
)

_QUESTIONS = (
    "Which engines does the railway have, and what happened to one of them?",
    "Who was Agnes Mallory, and what do her ledgers tell us?",
    "Why is there a brass plate on the crane?",
    "How did Miss Finch use the trains in her lessons?",
    "How did Ruth Adler come to the island?",
    "How did Clara Mallory save the northern part of the line?",
    "What did the engine Tern do in the fog of 1962?",
    "What is unusual about the engine Petrel?",
    "What is the new engine called, and who chose its name?",
)

_LAST_QUESTION = (
    "Thank you. Looking back over the whole book, which person did the most for the railway, and what did they do?"
)


def _plain(text: str) -> str:
    return " ".join(text.split())


CHAPTERS = tuple(_plain(chapter) for chapter in _CHAPTERS)

# What the user says, turn by turn.
TURNS = (
    *(f"{chapter}\n\n{question}" for chapter, question in zip(CHAPTERS, _QUESTIONS, strict=True)),
    _LAST_QUESTION,
)

# After these turns of the conversation (the first is 1) the other readers ask their next question.
READERS_ASK_AFTER = (3, 7, 9)
KILL_AFTER = 5


@dataclass(frozen=True, slots=True)
class Reader:
    """Another user of the same engine."""

    system: str
    questions: Sequence[str]

    def opening(self) -> list[Message]:
        """The whole book, before the first question."""
        book = "\n\n".join(CHAPTERS)
        return [{"role": "system", "content": f"{self.system}\n\n{book}"}]


READERS = (
    Reader(
        "You help a teacher to prepare lessons from this book.",
        ("Which chapter suits a lesson about measuring?", "Which suits a lesson about money?", "And about the war?"),
    ),
    Reader(
        "You help a painter who wants to illustrate this book.",
        ("Which scene has the sea in it?", "Which scene would be painted at night?", "Which is the funniest one?"),
    ),
)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}
