"""The demo's messages: one long conversation, and two other readers who compete for DRAM.

The conversation reads a short book, one chapter per turn, and ends with a question about all of it.
The first message of each other reader is the whole book. They ask a question between some turns:
the daemon promotes their blocks to DRAM, and evicts the conversation's blocks to SSD.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Message = dict[str, str]

BLOCK_TOKENS = 256  # A session keeps the partial block at the end of a history.
ANSWER_TOKENS_MIN, ANSWER_TOKENS_MAX = 24, 32

# After these turns of the conversation (the first is 1) the other readers ask their next question.
READERS_ASK_AFTER = (3, 7, 9)
KILL_AFTER = 5

CHAPTERS = tuple(" ".join(text.split()) for text in Path(__file__).with_name("book.txt").read_text().split("\n\n"))

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

# What the user says, turn by turn.
TURNS = (
    *(f"{chapter}\n\n{question}" for chapter, question in zip(CHAPTERS, _QUESTIONS, strict=True)),
    "Thank you. Looking back over the whole book, which person did the most for the railway, and what did they do?",
)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def opening() -> list[Message]:
    """The conversation before its first turn."""
    text = "You are a patient librarian. Answer in a few plain sentences, and only from the text that you have."
    return [{"role": "system", "content": text}]


@dataclass(frozen=True, slots=True)
class Reader:
    """Another user of the same engine."""

    system: str
    questions: Sequence[str]

    def opening(self) -> list[Message]:
        """The whole book, before the first question."""
        return [{"role": "system", "content": "\n\n".join([self.system, *CHAPTERS])}]


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
