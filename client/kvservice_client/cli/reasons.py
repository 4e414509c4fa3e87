"""Why a block is where it is, or why it is missing, as sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kvservice_api.v1 import admin_pb2 as pb
from kvservice_api.v1 import types_pb2
from kvservice_client.cli import output


def _tier(of: pb.Place | pb.BlockEvent) -> str:
    """The tier's name; a daemon of an older version sends numbers only."""
    return of.tier_name or {types_pb2.TIER_DRAM: "dram", types_pb2.TIER_SSD: "ssd"}.get(of.tier, "a tier")


def arrival(place: pb.Place) -> str:
    """How a copy came to its tier: ``in dram since ..., by its save``."""
    tier = _tier(place)
    where = "on ssd" if tier == "ssd" else f"in {tier}"
    how = {
        pb.ARRIVAL_SAVED: "by its save",
        pb.ARRIVAL_PROMOTED: "promoted for a load or a prefetch",
        pb.ARRIVAL_HINTED: "promoted because of a hint",
        pb.ARRIVAL_WRITTEN_BEHIND: "written behind",
    }.get(place.arrival, "it was stored when the daemon started")
    return f"{where} since {output.when(place.since)}, {how}" if place.HasField("since") else f"{where}: {how}"


def event(event: pb.BlockEvent) -> str:
    """What happened, where and when."""
    tier = _tier(event)
    at = output.when(event.at)
    ended = f" after its pin had ended at {output.when(event.pin_ended_at)}" if event.HasField("pin_ended_at") else ""
    because = f": {event.detail}" if event.detail else " on request"
    sentences = {
        pb.EVENT_KIND_REFUSED: f"a save of it at {at} was refused: {event.detail}",
        pb.EVENT_KIND_ABANDONED: f"a save of it ended at {at} without a commit",
        pb.EVENT_KIND_EVICTED: f"evicted from {tier} at {at} by the policy {event.detail}{ended}{_space_for(event)}",
        pb.EVENT_KIND_EVICTED_ON_REQUEST: f"evicted from {tier} at {at} on request{ended}",
        pb.EVENT_KIND_DISCARDED: f"discarded at {at}{because}",
        pb.EVENT_KIND_QUARANTINED: f"quarantined at {at}: its bytes in {tier} were damaged",
        pb.EVENT_KIND_LOST: f"lost from {tier} when the daemon started at {at}",
        pb.EVENT_KIND_EXPIRED: f"the last session that named it expired at {at}",
    }
    return sentences.get(event.kind, f"something that this kvctl does not know happened at {at}")


_SPACE_FOR = {
    pb.SPACE_FOR_SAVE: "a save",
    pb.SPACE_FOR_LOAD: "a load",
    pb.SPACE_FOR_PREFETCH: "a prefetch or hint of a client",
    pb.SPACE_FOR_READ_AHEAD: "blocks that the policy read ahead",
    pb.SPACE_FOR_COPY: "a copy from the tier above",
    pb.SPACE_FOR_FREE_SHARE: "the share that is kept free",
    pb.SPACE_FOR_INDEX: "other records in the index",
}


def _space_for(event: pb.BlockEvent) -> str:
    if event.space_for not in _SPACE_FOR:
        return ""
    score = f" (its score was {event.score:.6g}, the lowest)" if event.HasField("score") else ""
    return f" for {_SPACE_FOR[event.space_for]}{score}"


def worth(worth: pb.PolicyWorth) -> Iterator[str]:
    """What a block is worth to the policy: what is known of its item, and a line per tier."""
    if not worth.values:
        yield f"the policy {worth.policy} does not know it yet"
        return
    inputs = worth.values[0].inputs
    known = ", ".join(say(inputs[name]) for name, say in _OF_ITEM.items() if name in inputs)
    yield f"what the policy {worth.policy} knows of its conversation or prefix: {known}"
    for each in worth.values:
        where = "on ssd" if each.tier_name == "ssd" else f"in {each.tier_name}"
        yield f"  {where} it has the score {each.score:.6g}: the lowest scores leave first"
        for name in sorted(each.inputs.keys() - _OF_ITEM):
            value = each.inputs[name]
            yield f"    {_IN_TIER[name](value) if name in _IN_TIER else f'{name} {value:.6g}'}"


def _seconds(value: float) -> str:
    """A time in its largest unit."""
    for unit_s, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if value >= unit_s:
            return f"{value / unit_s:.1f} {name}"
    return f"{value:.1f} s"


_OF_ITEM: dict[str, Callable[[float], str]] = {  # What a daemon sends of the item, the same in each tier.
    "size_bytes": lambda value: output.size(value),
    "dram_bytes": lambda value: f"{output.size(value)} of it in dram",
    "ssd_bytes": lambda value: f"{output.size(value)} of it on ssd",
    "uses": lambda value: "used once" if value == 1 else f"used {value:.0f} times",
    "idle_s": lambda value: f"the last time {_seconds(value)} ago",
    "in_use": lambda value: "in use now" if value else "not in use now",
    "requests_before_it": lambda value: f"queued behind {value:.0f} requests",
    "hinted_s_ago": lambda value: f"announced by a hint {_seconds(value)} ago",
    "returns_per_s": lambda value: (
        f"its next use is expected in about {_seconds(1 / value)}" if value > 0 else "no next use is expected"
    ),
    "value": lambda value: f"a use has the weight {value:.3g}",
}
_IN_TIER: dict[str, Callable[[float], str]] = {  # What differs by tier. A newer daemon may send more.
    "least_score_kept": lambda value: f"the lowest that stay have about {value:.6g}",
    "window_requests": lambda value: f"the next {value:.0f} requests protect what they read",
    "blocks_before_it": lambda value: f"{value:.0f} blocks were used longer ago, and leave before it",
}


def miss(miss: pb.Miss, others: Sequence[pb.OtherLayout] = ()) -> str:
    """Why the block is missing, or was missing."""
    since = output.when(miss.remembers_since)
    emptied = ""
    if miss.HasField("dram_emptied_at"):
        emptied = f"the DRAM tier was emptied at {output.when(miss.dram_emptied_at)} ({miss.dram_emptied_because})"
    if miss.reason == pb.MISS_REASON_LOST_IN_RESTART and emptied:
        return f"{event(miss.event)}; {emptied}"
    if miss.reason == pb.MISS_REASON_IN_PART:
        past = f" ({event(miss.event)})" if miss.HasField("event") else ""
        return f"stored only in part: not all of the requested range{past}"
    if miss.HasField("event"):
        return event(miss.event)
    if miss.reason == pb.MISS_REASON_OTHER_LAYOUT:
        return "other layout: nothing is stored under this one. " + " ".join(map(other_layout, others))
    if miss.reason == pb.MISS_REASON_BEING_SAVED:
        return "not stored yet: a save of it runs now"
    if miss.reason == pb.MISS_REASON_NEVER_STORED_OR_LOST:
        return f"never stored here, or lost when {emptied}; the history begins at {since}"
    return f"never stored here since {since}, when the history begins"


def other_layout(other: pb.OtherLayout) -> str:
    """Under which layout the model's blocks are stored, and how that layout differs."""
    differences = ", ".join(f"{each.field} {each.stored} (requested: {each.asked})" for each in other.differences)
    return f"Blocks of this model are stored under layout {other.layout_fingerprint.hex()[:16]}: {differences}."
