"""How each request goes up to its first token, and its report to the daemon, which `kvctl explain` shows."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from kvservice_adapter.engine.request_report import fields_of_plan
from kvservice_api.cost import Plan
from kvservice_client import Outcome, RequestReport

_ID_BYTES_MAX = 200  # The daemon refuses longer ones.
_RANDOM = re.compile(r"-[0-9a-f]{8}\Z")
# One prompt of a completion, one round of a response, or one choice of several (`n`): its name, and that of the whole.
_PART = re.compile(r"(?:\d+_)?(?:(cmpl-.+)-\d+|(resp_.+)_\d+|(chatcmpl-.+))\Z", re.DOTALL)


def response_id(request_id: str, *, is_randomized: bool) -> str:
    """The id that users know: of the HTTP response that a vLLM request is part of; else as it was given to vLLM.

    `is_randomized`: vLLM has added characters to it, so that ids differ. It has at most 200 bytes.
    """
    given = _RANDOM.sub("", request_id) if is_randomized else request_id
    part = _PART.match(given)
    known = str(part[part.lastindex or 0]) if part is not None else given
    return known.encode(errors="replace")[:_ID_BYTES_MAX].decode(errors="ignore")


class EndedLoad(NamedTuple):
    """A load of one worker."""

    request_id: str  # As vLLM has it.
    size_bytes: int
    seconds: float
    waited_s: float  # Of it, how long the engine waited.
    transport: str


@dataclass(slots=True)
class RequestProgress:
    """One request. For one thread."""

    request_id: str  # The response's.
    began_s: float
    outcome: Outcome = Outcome.MISS
    why: str = ""
    lookup_s: float | None = None
    plan: Plan | None = None
    planned_at_s: float = 0.0
    tier: str = ""
    stored_tokens: int = 0  # That the lookup found.
    own_tokens: int = 0  # Of these, how many vLLM has itself.
    load_tokens: int = 0  # Of these, how many are loaded.
    loads: list[EndedLoad] = field(default_factory=list)

    def ends_as(self, outcome: Outcome, why: str = "") -> None:
        """What is known now. Later steps may change it."""
        self.outcome, self.why = outcome, why

    def begins(self) -> None:
        """The request is looked up: for the first time, or again after vLLM has preempted it, or let it wait."""
        self.plan, self.tier, self.loads = None, "", []
        self.stored_tokens = self.own_tokens = self.load_tokens = 0

    def looked_up(self, now_s: float) -> None:
        """There is an answer, or it is not waited for any more. It is a miss until something else is known."""
        self.lookup_s = now_s - self.began_s
        self.ends_as(Outcome.MISS)

    def found(self, tokens: int, tier: str) -> None:
        self.stored_tokens, self.tier = tokens, tier
        self.ends_as(Outcome.DONE)

    def planned(self, plan: Plan | None, own_tokens: int, now_s: float) -> None:
        """How the stored tokens behind the engine's own are to get there. None if there are no such tokens."""
        self.plan, self.planned_at_s = plan, now_s
        self.own_tokens = min(own_tokens, self.stored_tokens)
        if plan is None:
            self.ends_as(Outcome.DONE, "vLLM has the stored tokens itself")

    def load_failed(self, valid_tokens: int, why: str) -> None:
        """Only the first `valid_tokens` of the request are there: those after them are computed."""
        self.load_tokens = min(self.load_tokens, max(0, valid_tokens - self.own_tokens))
        self.ends_as(Outcome.FAILED_OVER, why)

    def report(self, prompt_tokens: int, now_s: float, *, has_token: bool) -> RequestReport:
        """`has_token`: the first token of the answer has just been computed. Else the request ends without one."""
        loads = self.loads
        return RequestReport(
            request_id=self.request_id,
            outcome=self.outcome,
            outcome_reason=self.why if has_token else "; ".join(filter(None, (self.why, "it ended without a token"))),
            history_tokens=self.stored_tokens,
            new_tokens=max(0, prompt_tokens - self.stored_tokens),  # After a preemption its answer is looked up too.
            loaded_tokens=self.load_tokens,
            computed_tokens=self.stored_tokens - self.own_tokens - self.load_tokens,
            loaded_bytes=sum(load.size_bytes for load in loads),
            tier=self.tier,
            transport="+".join(sorted({load.transport for load in loads})),
            began_s=self.began_s,
            lookup_s=self.lookup_s,
            load_s=max((load.seconds for load in loads), default=None),
            waited_s=max((load.waited_s for load in loads), default=None),
            first_token_s=now_s - self.began_s if has_token else None,
            **fields_of_plan(self.plan),
        )
