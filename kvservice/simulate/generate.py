"""Generated load: conversations like ShareGPT's, and people at an interactive service.

Every request after a session's first arrives one think time after the previous answer, so a slow server slows its
users down. All values are drawn from one random generator: the same seed gives the same workload.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvservice.simulate.generated_hints import typing_hints
from kvservice.simulate.think_times import Shape, draw, people_mean_s, unit_lognormal
from kvservice.simulate.workload import AFTER_ANSWER, Workload

# ShareGPT: 27 % of conversations have one turn; the others 2 to 40, 7.51 on average, P(n) ~ n^-0.5 0.8961^n.
_SINGLE_SHARE = 0.27
_TURNS_MAX = 40
_TURNS_POWER = -0.5
_TURNS_DECAY = 0.8961
# Tokens per turn: 564 on average before the limits, times a factor per session. Questions have about a third of them.
# The mean and the factor's spread are fitted so that 47 % of sessions have over 2K tokens and 30 % over 4K.
_TURN_TOKENS = 564.0
_SESSION_SIGMA = 1.0
_SESSION_MEDIAN = np.exp(_SESSION_SIGMA**2 / 2)
_QUESTION_SHARE = 0.32
_QUESTION_SIGMA = 1.2
_QUESTION_TOKENS_MAX = 8192
_ANSWER_SIGMA = 0.7
_ANSWER_TOKENS_MAX = 2048


def sharegpt(
    *,
    sessions: int = 9000,
    session_rate: float = 1.0,
    think_s: float = 30.0,
    shape: Shape = "people",
    context_tokens: int = 4096,
    typing_lead_s: tuple[float, float] | None = None,
    false_hints: float = 0.0,
    seed: int = 0,
) -> Workload:
    """`sessions` conversations that begin as a Poisson process with `session_rate` per second.

    Args:
        think_s: Mean seconds from the end of an answer to the next request; 0 for none.
        shape: Distribution of the think times, see `think_times.draw`.
        context_tokens: The model's window; 0 for no limit.
        typing_lead_s: (least, most) seconds between a typing hint and its request. A session's first request has none.
        false_hints: The share of wrong hints among all hints.

    Raises ValueError for values out of range.
    """
    rng = np.random.default_rng(seed)
    turns = _sharegpt_turns(_count("sessions", sessions), rng)
    session = np.repeat(np.arange(sessions, dtype=np.int32), turns)
    count = len(session)
    tokens = (_TURN_TOKENS * _SESSION_MEDIAN * unit_lognormal(_SESSION_SIGMA, sessions, rng))[session]
    return _closed_loop(
        "sharegpt",
        session=session,
        begins_s=_poisson(sessions, session_rate, rng),
        think=_think_times(session, think_s, shape, rng),
        new_tokens=_whole(tokens * _QUESTION_SHARE * unit_lognormal(_QUESTION_SIGMA, count, rng), _QUESTION_TOKENS_MAX),
        output_tokens=_whole(
            tokens * (1 - _QUESTION_SHARE) * unit_lognormal(_ANSWER_SIGMA, count, rng), _ANSWER_TOKENS_MAX
        ),
        context_tokens=context_tokens,
        typing_lead_s=typing_lead_s,
        false_hints=false_hints,
        rng=rng,
    )


# The interactive service: 21 to 23 turns per user, p90 45 to 48 (a gamma distribution of this shape, rounded up, has
# both); queries of 35 and replies of 44 tokens on average.
_PEOPLE_TURNS = 22.0
_PEOPLE_TURNS_SHAPE = 1.4
_PEOPLE_QUERY_TOKENS = 35.0
_PEOPLE_REPLY_TOKENS = 44.0
_PEOPLE_TOKENS_SIGMA = 0.8
_PEOPLE_TOKENS_MAX = 4096
_PEOPLE_START_TOKENS = 45.0  # In addition to the query: the first prompt has 80 tokens.
# A gap grows with the answer that the user reads, by 19 s and 0.63 s per token, and each user's own pace explains 12 %
# of the gaps' variance. The shares are fitted to the rank correlations at the service: of a gap with the answer before
# it (0.75), and with the gap before it (0.30).
_READING_S, _READING_S_PER_TOKEN = 19.0, 0.63
_PEOPLE_ANSWER_SHARE, _PEOPLE_PACE_SHARE = 0.62, 0.12
_PEOPLE_LENGTH_SHARE = 0.31  # Of the variance of answers' logarithms: the users'.


def people(
    *,
    users: int = 2000,
    user_rate: float = 0.2,
    start_tokens: float = _PEOPLE_START_TOKENS,
    start_sigma: float = 0.5,
    think_s: float | None = None,
    shape: Shape = "people",
    pace_sigma: float = 0.0,
    answer_power: float = 0.0,
    answer_share: float = _PEOPLE_ANSWER_SHARE,
    context_tokens: int = 0,
    typing_lead_s: tuple[float, float] | None = None,
    false_hints: float = 0.0,
    seed: int = 0,
) -> Workload:
    """Users of a real interactive service: 22 short turns on average, from an empty conversation on, and think times
    that follow the answers' lengths.

    Args:
        users: Number of users, one session each. They arrive as a Poisson process with `user_rate` per second.
        start_tokens: Mean tokens of a session's first request in addition to its query: a persona, documents.
        start_sigma: Sigma of the lognormal spread of `start_tokens` over users; 0 for the same value for all.
        think_s: Mean seconds from the end of an answer to the next request; None: as in the real service, 0: none.
        shape: Distribution of the think times, see `think_times.draw`.
        pace_sigma: Sigma of a lognormal factor per session, of mean 1, on its think times.
        answer_power: Think times are proportional to this power of the length of the previous answer.
        answer_share: How much of the variance in the order of think times the previous answer explains. The think times
            keep their distribution: they are given to the turns in another order. With 0, think times depend on
            nothing and users differ in nothing, except by `pace_sigma` and `answer_power`.
        context_tokens, typing_lead_s, false_hints: As for `sharegpt`.

    Raises ValueError for values out of range.
    """
    rng = np.random.default_rng(seed)
    scale = _PEOPLE_TURNS - 0.5  # Rounding up adds 0.5 on average.
    turns = np.ceil(rng.gamma(_PEOPLE_TURNS_SHAPE, scale / _PEOPLE_TURNS_SHAPE, _count("users", users))).astype(
        np.int64
    )
    session = np.repeat(np.arange(users, dtype=np.int32), np.maximum(turns, 1))
    count = len(session)
    queries = _PEOPLE_QUERY_TOKENS * unit_lognormal(_PEOPLE_TOKENS_SIGMA, count, rng)
    if not 0 <= answer_share <= 1 - _PEOPLE_PACE_SHARE:
        raise ValueError(f"answer_share must be from 0 to {1 - _PEOPLE_PACE_SHARE:g}, not {answer_share}")
    if answer_share:
        of_users, of_turns = (
            _PEOPLE_TOKENS_SIGMA * np.sqrt(share) for share in (_PEOPLE_LENGTH_SHARE, 1 - _PEOPLE_LENGTH_SHARE)
        )
        replies = _PEOPLE_REPLY_TOKENS * unit_lognormal(of_users, users, rng)[session]
        replies *= unit_lognormal(of_turns, count, rng)
    else:
        replies = _PEOPLE_REPLY_TOKENS * unit_lognormal(_PEOPLE_TOKENS_SIGMA, count, rng)
    new_tokens = _whole(queries - 0.5, _PEOPLE_TOKENS_MAX)
    output_tokens = _whole(replies - 0.5, _PEOPLE_TOKENS_MAX)
    first = _first_turns(session)
    new_tokens[first] += np.rint(start_tokens * unit_lognormal(start_sigma, users, rng)).astype(np.int32)
    think = _think_times(session, people_mean_s() if think_s is None else think_s, shape, rng)
    if answer_share:
        think = _after_answers(think, session, output_tokens, answer_share, rng)
    if pace_sigma:
        think *= unit_lognormal(pace_sigma, users, rng)[session]
    if answer_power:
        longer = (output_tokens / output_tokens.mean()) ** answer_power
        think[1:] *= longer[:-1] / longer[:-1].mean()
    return _closed_loop(
        "people",
        session=session,
        begins_s=_poisson(users, user_rate, rng),
        think=think,
        new_tokens=new_tokens,
        output_tokens=output_tokens,
        context_tokens=context_tokens,
        typing_lead_s=typing_lead_s,
        false_hints=false_hints,
        rng=rng,
    )


def _after_answers(
    think: NDArray[np.float64],
    session: NDArray[np.int32],
    output_tokens: NDArray[np.int32],
    answer_share: float,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """The think times in an order in which long ones follow long answers, and slow users have more of them."""
    again = np.flatnonzero(session[1:] == session[:-1]) + 1
    reading = np.log(_READING_S + _READING_S_PER_TOKEN * output_tokens[again - 1])
    if len(again) and (spread := reading.std()):
        reading = (reading - reading.mean()) / spread
    slowness = np.sqrt(answer_share) * reading
    slowness += np.sqrt(_PEOPLE_PACE_SHARE) * rng.standard_normal(session[-1] + 1)[session[again]]
    slowness += np.sqrt(1 - answer_share - _PEOPLE_PACE_SHARE) * rng.standard_normal(len(again))
    ordered = think.copy()
    ordered[again[np.argsort(slowness)]] = np.sort(think[again])
    return ordered


def _closed_loop(
    name: str,
    *,
    session: NDArray[np.int32],
    begins_s: NDArray[np.float64],
    think: NDArray[np.float64],
    new_tokens: NDArray[np.int32],
    output_tokens: NDArray[np.int32],
    context_tokens: int,
    typing_lead_s: tuple[float, float] | None,
    false_hints: float,
    rng: np.random.Generator,
) -> Workload:
    if context_tokens < 0:
        raise ValueError(f"context_tokens must not be negative, not {context_tokens}")
    arrives = np.full(len(session), AFTER_ANSWER)
    arrives[_first_turns(session)] = begins_s
    think[_first_turns(session)] = 0.0
    return Workload(
        name=name,
        session=session,
        arrives_s=arrives,
        think_s=think,
        new_tokens=new_tokens,
        output_tokens=output_tokens,
        hints=typing_hints(session, think, typing_lead_s, false_hints, rng),
        context_tokens=context_tokens,
    )


def _sharegpt_turns(sessions: int, rng: np.random.Generator) -> NDArray[np.int64]:
    counts = np.arange(1, _TURNS_MAX + 1)
    chance = counts**_TURNS_POWER * _TURNS_DECAY**counts
    chance[0] = 0.0
    chance *= (1 - _SINGLE_SHARE) / chance.sum()
    chance[0] = _SINGLE_SHARE
    return rng.choice(counts, sessions, p=chance)


def _poisson(count: int, rate: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Times of `count` arrivals in seconds, `rate` per second on average."""
    if not 0 < rate < np.inf:
        raise ValueError(f"the rate of arrivals must be above 0 per second, not {rate}")
    return np.cumsum(rng.exponential(1 / rate, count))


def _think_times(
    session: NDArray[np.int32], think_s: float, shape: Shape, rng: np.random.Generator
) -> NDArray[np.float64]:
    if not 0 <= think_s < np.inf:
        raise ValueError(f"think_s must be 0 or more seconds, not {think_s}")
    return think_s * draw(shape, len(session), rng)


def _first_turns(session: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.flatnonzero(np.diff(session, prepend=-1))


def _whole(tokens: NDArray[np.float64], most: int) -> NDArray[np.int32]:
    """Rounded up to 1 or more: a request and an answer have at least one token each."""
    return np.clip(np.ceil(tokens), 1, most).astype(np.int32)


def _count(name: str, count: int) -> int:
    if count < 1:
        raise ValueError(f"{name} must be 1 or more, not {count}")
    return count
