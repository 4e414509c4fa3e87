"""Shows the policy that decides about places, switches it, and runs another one beside it."""

from __future__ import annotations

from dataclasses import dataclass

from kvservice.blocks import BlockTable
from kvservice.counters import Counters
from kvservice.policy import DAEMON_POLICIES, daemon_policy
from kvservice.policy.lru import LruPolicy
from kvservice.policy.placement import Placement
from kvservice.store.caller import Caller
from kvservice.store.mover.active_policy import ActivePolicy
from kvservice.store.mover.shadow_run import ShadowFacts
from kvservice_api.errors import InvalidRequest

NO_SHADOW = "none"


@dataclass(frozen=True, slots=True)
class PolicyFacts:
    """`items` is 0 for a policy over single blocks, and `ranking_ms` and `look_ms` are 0 until there was one.

    Reads ahead are those on a guess, since the policy began.
    """

    name: str
    since_ms: int
    configured: str  # What a restart begins with.
    items: int
    blocks: int
    queued: int  # Items that queued requests will read.
    ranking_ms: float
    look_ms: float
    read_ahead_bytes: int
    read_ahead_unused: float  # The share of their blocks that left DRAM unused, 0 to 1.
    shadow: ShadowFacts | None
    shadow_real_read_bytes: int  # What was really read ahead since the shadow began.


class Policies:
    def __init__(self, policy: ActivePolicy, blocks: BlockTable, counters: Counters, configured: str) -> None:
        self._policy = policy
        self._blocks = blocks
        self._counters = counters
        self._configured = configured
        self._shadow_read_bytes = 0
        self._note_reads()

    def _note_reads(self) -> None:
        """Count reads ahead from now on."""
        counters = self._counters
        self._read_before = (
            counters.read_ahead_bytes,
            counters.read_ahead_blocks,
            counters.read_ahead_unused_blocks,
        )

    async def show(self, caller: Caller) -> PolicyFacts:
        policy, counters = self._policy, self._counters
        read_bytes, read_blocks, unused_blocks = self._read_before
        read_blocks, unused_blocks = (
            counters.read_ahead_blocks - read_blocks,
            counters.read_ahead_unused_blocks - unused_blocks,
        )
        items = queued = 0
        blocks, ranking_s, look_s = self._blocks.live_count, 0.0, 0.0
        if (ranking := policy.items) is not None:
            items, blocks, queued = await ranking.on_thread(lambda known, now_s: known.known())
            ranking_s, look_s = ranking.ranking_s, ranking.look_s
        return PolicyFacts(
            name=policy.name,
            since_ms=policy.since_ms,
            configured=self._configured,
            items=items,
            blocks=blocks,
            queued=queued,
            ranking_ms=1e3 * ranking_s,
            look_ms=1e3 * look_s,
            read_ahead_bytes=counters.read_ahead_bytes - read_bytes,
            read_ahead_unused=unused_blocks / read_blocks if read_blocks else 0.0,
            shadow=await policy.shadow.facts() if policy.shadow is not None else None,
            shadow_real_read_bytes=counters.read_ahead_bytes - self._shadow_read_bytes,
        )

    async def set(self, caller: Caller, name: str, shadow: str) -> PolicyFacts:
        """Use the policy `name`, and run `shadow` beside it, until the restart. Empty names change nothing.

        A policy that decides already is not restarted. Raises InvalidRequest; then nothing has changed.
        """
        _check(name, DAEMON_POLICIES, "policy")
        _check(shadow, (*DAEMON_POLICIES, NO_SHADOW), "shadow")
        if name and name != self._policy.name:
            await self._policy.switch(daemon_policy(name))
            self._note_reads()
        if shadow:
            self._policy.run_shadow(None if shadow == NO_SHADOW else _over_items(shadow))
            self._shadow_read_bytes = self._counters.read_ahead_bytes
        return await self.show(caller)


def _over_items(name: str) -> Placement:
    return daemon_policy(name) or LruPolicy()


def _check(name: str, names: tuple[str, ...], field: str) -> None:
    if name and name not in names:
        raise InvalidRequest(f"no policy is called {name!r:.40}: choose among {', '.join(names)}", field=field)
