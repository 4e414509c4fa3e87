"""The output of ``kvctl top`` and ``explain`` for given answers of the daemon."""

from __future__ import annotations

import re
from io import StringIO

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console

from kvservice_api.v1 import admin_pb2 as pb
from kvservice_api.v1 import types_pb2
from kvservice_client.cli import output, reasons
from kvservice_client.cli.top import StatusDelta, _picture

NOON = Timestamp(seconds=1_700_000_000)


def status(boot_epoch: int = 1, **counters: float) -> pb.StatusResponse:
    return pb.StatusResponse(boot_epoch=boot_epoch, counters=counters)


def test_rates_are_what_was_counted_between_two_looks_by_the_time_between_them() -> None:
    before = status(load_bytes=100, lookup_blocks_asked=10, lookup_blocks_hit=10)
    view = StatusDelta.between(before, status(load_bytes=300, lookup_blocks_asked=18, lookup_blocks_hit=12), 4.0)
    assert view.per_second["load_bytes"] == 50
    assert view.per_second["save_bytes"] == 0
    assert view.hit_ratio == 0.25


def test_of_a_daemon_that_was_restarted_between_two_looks_nothing_is_negative() -> None:
    view = StatusDelta.between(status(load_bytes=1000, lookup_blocks_asked=5), status(2, load_bytes=30), 2.0)
    assert view.per_second["load_bytes"] == 15
    assert view.hit_ratio is None


def picture(view: StatusDelta, address: str) -> str:
    console = Console(file=StringIO(), width=200)
    console.print(_picture(view, address, 200))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_what_is_read_in_place_is_shown_beside_what_is_sent() -> None:
    view = StatusDelta.between(status(), status(located_blocks=8, load_blocks=3), 2.0)
    assert view.as_json()["per_second"]["located_blocks"] == 4
    assert re.search(r"loads by stream +1\.5 .*\nread in place +4\.0", picture(view, "here"))


@pytest.mark.parametrize("address", ["[fd00::1]:7070", "/run/[/x]/kvservice.sock"])
def test_an_address_is_shown_as_it_is_written(address: str) -> None:
    assert f"at {address}: " in picture(StatusDelta.between(status(), status(), 1.0), address)


@pytest.mark.parametrize("kind", [kind for kind in pb.EventKind.values() if kind])
def test_every_event_has_a_sentence_with_its_time(kind: pb.EventKind) -> None:
    event = pb.BlockEvent(kind=kind, at=NOON, tier=types_pb2.TIER_SSD, detail="lru")
    assert output.when(NOON) in reasons.event(event)
    assert "does not know" not in reasons.event(event)


@pytest.mark.parametrize("tier", [types_pb2.TIER_DRAM, types_pb2.TIER_SSD])
@pytest.mark.parametrize("arrival", [arrival for arrival in pb.Arrival.values() if arrival])
def test_every_arrival_has_a_sentence(arrival: pb.Arrival, tier: types_pb2.Tier) -> None:
    place = pb.Place(tier=tier, arrival=arrival, since=None if arrival == pb.ARRIVAL_KEPT else NOON)
    said = reasons.arrival(place)
    assert said.startswith("in dram" if tier == types_pb2.TIER_DRAM else "on ssd")
    assert ("when the daemon started" in said) == (arrival == pb.ARRIVAL_KEPT)


_EVICTED = pb.BlockEvent(kind=pb.EVENT_KIND_EVICTED, at=NOON, tier=types_pb2.TIER_SSD, detail="lru", pin_ended_at=NOON)
_LOST = pb.BlockEvent(kind=pb.EVENT_KIND_LOST, at=NOON, tier=types_pb2.TIER_DRAM)


@pytest.mark.parametrize(
    ("miss", "words"),
    [
        (pb.Miss(reason=pb.MISS_REASON_NEVER_STORED), "never stored here since"),
        (pb.Miss(reason=pb.MISS_REASON_EVICTED, event=_EVICTED), "by the policy lru"),
        (pb.Miss(reason=pb.MISS_REASON_EXPIRED, event=_EVICTED), "after its pin had ended"),
        (pb.Miss(reason=pb.MISS_REASON_BEING_SAVED), "a save of it runs now"),
        (pb.Miss(reason=pb.MISS_REASON_IN_PART, event=_EVICTED), "only in part"),
        (pb.Miss(reason=pb.MISS_REASON_OTHER_LAYOUT), "other layout"),
        (
            pb.Miss(reason=pb.MISS_REASON_LOST_IN_RESTART, event=_LOST, dram_emptied_at=NOON, dram_emptied_because="!"),
            "(!)",
        ),
        (pb.Miss(reason=pb.MISS_REASON_NEVER_STORED_OR_LOST, dram_emptied_at=NOON, dram_emptied_because="!"), "(!)"),
    ],
    ids=lambda value: pb.MissReason.Name(value.reason) if isinstance(value, pb.Miss) else "",
)
def test_a_miss_has_a_sentence(miss: pb.Miss, words: str) -> None:
    assert words in reasons.miss(miss)


def test_another_layout_is_named_with_what_is_different() -> None:
    difference = pb.LayoutDifference(field="dtype", stored="float16", asked="bfloat16")
    other = pb.OtherLayout(layout_fingerprint=bytes(32), differences=[difference])
    said = reasons.miss(pb.Miss(reason=pb.MISS_REASON_OTHER_LAYOUT), [other])
    assert "dtype float16 (requested: bfloat16)" in said


def test_enums_of_a_newer_daemon_show_as_numbers() -> None:
    assert output.enum_name(pb.MissReason.DESCRIPTOR, pb.MISS_REASON_OTHER_LAYOUT) == "other_layout"
    assert output.enum_name(pb.MissReason.DESCRIPTOR, 99) == "99"
