"""What the user should know before believing a run's figures."""

from __future__ import annotations

from collections.abc import Sequence

from kvservice.simulate.result import Result
from kvservice.simulate.settings import Machine

#: Below this share a server does not keep up. Runs of few turns end a little later than the load without any queue.
_KEEPS_UP = 0.95
_ALL = 0.999


def notes_of(results: Sequence[Result], machine: Machine) -> tuple[str, ...]:
    """Sentences on an overloaded server, a server that hits do not speed up, and an optimum that is no bar."""
    notes = []
    slow = {each.policy: f"{each.server_share:.2f}" for each in results if each.server_share < _KEEPS_UP}
    if slow:
        same = len(set(slow.values())) == 1 and len(slow) == len(results)
        taken = next(iter(slow.values())) if same else ", ".join(f"{share} ({name})" for name, share in slow.items())
        notes.append(
            f"The server processes {taken} of the arriving load. So its queue grows, and times to first token with it. "
            "Give fewer requests, or a faster server."
        )
    if machine.service_turns_per_s is not None:
        notes.append(
            "A server of --service-turns-per-s starts no turn sooner because of hits: they save time to first token "
            "after the queue, and none in it. Leave the option out for a GPU that hits make faster."
        )
    if any(each.policy == "optimum" and each.dram_on_time >= _ALL for each in results):
        notes.append(
            "optimum has all history in DRAM on time by construction: it knows every request, and the tiers hold and "
            "read enough. A share of it says little."
        )
    return tuple(notes)
