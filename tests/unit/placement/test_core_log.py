"""A recorded log of events gives the same commands in another core; and the bytes always add up."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.blocks import TierName
from kvservice.placement.core import Evict, PlacementCore
from kvservice.policy import PLACEMENTS
from kvservice.policy.items import Conditions, ItemTable
from kvservice.policy.placement import Placement
from kvservice.simulate import engine
from tests.workloads import machine, path_workloads, session_workloads

EVENTS = (
    *("queued", "hold", "used", "answered", "saved", "release", "stored", "hinted", "forget_if_gone"),
    *("entered", "left", "reserve", "cut_front", "resized", "dropped"),
    *("reads", "read_began", "read_ended", "read_cancelled", "read_to_stop"),
    *("write_began", "write_ended", "wants_in_dram", "is_idle_since"),
)


class Recorded(PlacementCore):
    """Writes down each event with what the policy knew of the machine, and the answer."""

    log: list[tuple[str, tuple[Any, ...], Conditions, Any]]
    made: list[Recorded]

    def __init__(self, items: ItemTable, policy: Placement, block_bytes: int = 0) -> None:
        super().__init__(items, policy, block_bytes)
        self.log = []
        self._inside = False
        self.made.append(self)

    def conditions(self) -> Conditions:
        return dataclasses.replace(self.items.conditions)

    def victims(self, tier: TierName, wanted_bytes: int, worth: float, now_s: float) -> Iterator[Evict]:
        arguments = (tier, wanted_bytes, worth, now_s)
        self.log.append(("victims", arguments, self.conditions(), None))
        commands = super().victims(*arguments)
        while True:
            command = next(commands, None)
            self.log.append(("next", (tier,), self.conditions(), command))
            if command is None:
                return
            yield command


def _recorded(name: str) -> Any:
    def event(self: Recorded, *arguments: Any, **named: Any) -> Any:
        if self._inside:
            return getattr(PlacementCore, name)(self, *arguments, **named)
        self._inside = True
        arguments = tuple(list(each) if isinstance(each, (memoryview, deque)) else each for each in arguments)
        conditions = self.conditions()
        try:
            answer = getattr(PlacementCore, name)(self, *arguments, **named)
        finally:
            self._inside = False
        self.log.append((name, (*arguments, named), conditions, answer))
        return answer

    return event


for _name in EVENTS:
    setattr(Recorded, _name, _recorded(_name))


def replayed(log: list[tuple[str, tuple[Any, ...], Conditions, Any]], core: PlacementCore) -> None:
    """Feed the events to another core, and compare its answers."""
    running: dict[TierName, Iterator[Evict]] = {}
    for number, (name, arguments, conditions, answer) in enumerate(log):
        for field in dataclasses.fields(Conditions):
            setattr(core.items.conditions, field.name, getattr(conditions, field.name))
        if name == "victims":
            running[arguments[0]] = core.victims(*arguments)
        elif name == "next":
            assert next(running[arguments[0]], None) == answer, number
        else:
            *positional, named = arguments
            assert getattr(core, name)(*positional, **named) == answer, (number, name)
        items = core.items
        assert core.dram.used_bytes == items.dram_bytes.sum() + items.coming_bytes.sum()
        assert core.ssd.used_bytes == items.ssd_bytes.sum() + sum(core._write_bytes.values())
        for space, column in ((core.dram, items.dram_bytes), (core.ssd, items.ssd_bytes)):
            assert all(column[row] and row not in core._holds for row in space.rows)


@given(
    st.one_of(session_workloads(), session_workloads(context_tokens=90), path_workloads()),
    st.sampled_from(sorted(PLACEMENTS)),
    st.sampled_from([60, 200]),
    st.sampled_from([0, 80, 1000]),
    st.sampled_from([5.0, 60.0]),
)
def test_the_log_of_a_simulation_gives_the_same_commands_in_another_core(
    workload: Any, policy: str, dram_bytes: int, ssd_bytes: int, ssd_bytes_per_s: float
) -> None:
    on = machine(dram_bytes, ssd_bytes, ssd_bytes_per_s=ssd_bytes_per_s, session_ttl_s=20.0)
    Recorded.made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "PlacementCore", Recorded)
        engine.simulate(workload, on, policy)
    (recorded,) = Recorded.made
    log = recorded.log
    items = ItemTable(recorded.items.row_count, dataclasses.replace(log[0][2]))
    items.value[:] = recorded.items.value  # The simulator does not change them.
    assert {name for name, *_ in log} >= {"queued", "used", "stored"}
    replayed(log, PlacementCore(items, PLACEMENTS[policy](), recorded._block_bytes))
