"""The metrics of what the daemon does with blocks: tiers, evictions, copies between tiers; and of the daemon itself."""

from __future__ import annotations

from collections.abc import Callable

from kvservice.counters import Durations
from kvservice.metrics.rows import Metric, Samples, Sources, from_zero, gauge, histogram, label, total, totals
from kvservice.store.types import STATES, TierFacts

_PROMOTED_FOR = (("load",), ("prefetch",), ("read_ahead",))


def _of_tiers(name: str, meaning: str, use: str, read: Callable[[TierFacts], float]) -> Metric:
    def all_tiers(from_: Sources) -> Samples:
        return {(tier.name,): read(tier) for tier in from_.facts.tiers}

    return Metric(name, "gauge", meaning, use, ("tier",), all_tiers)


def _certificate_expires(from_: Sources) -> Samples:
    return {} if from_.certificates is None else {(): from_.certificates.latest.expires_at_s}


def _layouts(from_: Sources) -> Samples:
    return {
        (label(layout), layout.model_id, str(layout.block_tokens)): 1 for layout, _ in from_.gauges.layouts.values()
    }


TIERS = (
    _of_tiers(
        "tier_capacity_bytes",
        "Bytes that blocks may use in the tier.",
        "Less than `tier_configured_bytes`: memory is short, or DRAM is still being prepared. `kvctl status` says why.",
        lambda tier: tier.capacity_bytes,
    ),
    _of_tiers(
        "tier_configured_bytes",
        "Bytes that blocks could use in the tier if nothing kept it smaller than its setting.",
        "Alert if the capacity stays below it.",
        lambda tier: tier.configured_bytes,
    ),
    _of_tiers(
        "tier_used_bytes",
        "Bytes that blocks use in the tier.",
        "A full tier is normal: it evicts.",
        lambda tier: tier.used_bytes,
    ),
    _of_tiers(
        "tier_refusing",
        "1 while a tier takes no blocks.",
        "Alert: a drive is full, read-only or broken. `kvctl status` has the error.",
        lambda tier: 1 if tier.refusing_because else 0,
    ),
    Metric(
        "tier_blocks",
        "gauge",
        "Stored objects with a copy in the tier.",
        "How much of the store is in DRAM.",
        ("tier",),
        lambda from_: {(tier,): count for tier, count in from_.gauges.blocks.items()},
    ),
    Metric(
        "tier_read_bytes_total",
        "counter",
        "Bytes read from a tier below DRAM: loads, promotions, scrubs, and copies further down.",
        "The drive's read load.",
        ("tier",),
        lambda from_: {(tier,): from_.counters.tier_read_bytes[tier] for tier in from_.tiers[1:]},
    ),
    Metric(
        "tier_written_bytes_total",
        "counter",
        "Bytes of blocks written to a tier below DRAM. Writes of the index are not counted.",
        "Wear: `rate(...[1d]) * 86400` over the capacity of the drive, not of the tier: drive writes per day.",
        ("tier",),
        lambda from_: {(tier,): from_.counters.tier_written_bytes[tier] for tier in from_.tiers[1:]},
    ),
    gauge("blocks", "Stored objects.", "The size of the store.", lambda s: s.facts.blocks),
    Metric(
        "layout_blocks",
        "gauge",
        "Stored objects of a layout.",
        "Which model fills the tiers.",
        ("layout",),
        lambda from_: {(label(layout),): count for layout, count in from_.gauges.layouts.values()},
    ),
    Metric(
        "layout_info",
        "gauge",
        "1 for each layout: its model and block size. `layout` has the first digits of the fingerprint.",
        "Join it to the metrics with the label `layout`, to see models: `... * on(layout) group_left(model) "
        "kvservice_layout_info`.",
        ("layout", "model", "block_tokens"),
        _layouts,
    ),
    gauge(
        "layouts",
        "Layouts that the store knows.",
        "One for each model, dtype and block size.",
        lambda s: s.facts.layouts,
    ),
    gauge(
        "layouts_max",
        "Layouts that the store may know: `index.layouts_max`.",
        "The limit of `layouts`: then new models are refused as `INDEX_FULL`.",
        lambda s: s.facts.layouts_max,
    ),
    gauge("pinned_blocks", "Pinned objects.", "They cannot be evicted.", lambda s: s.gauges.pinned_blocks),
    gauge(
        "pinned_bytes",
        "Bytes of pinned objects.",
        "Near the limit, `pins.fraction_max` of a tier, pins are refused as `PINS_FULL`.",
        lambda s: s.gauges.pinned_bytes,
    ),
    gauge(
        "set_aside_bytes",
        "DRAM that clients may still be writing to although their connection has ended.",
        "It stays: a process is stopped. See [operating](../operating.md#top).",
        lambda s: s.facts.set_aside_bytes,
    ),
    Metric(
        "index_used_bytes",
        "gauge",
        "Bytes of the pages in use in a tier's index.",
        "Near `index_map_bytes`, blocks are evicted although the tier has space: raise the map's size.",
        ("tier",),
        lambda from_: {(tier,): size for tier, size in from_.facts.index_used_bytes.items()},
    ),
    Metric(
        "index_map_bytes",
        "gauge",
        "Bytes that a tier's index may use.",
        "The limit of `index_used_bytes`.",
        ("tier",),
        lambda from_: {(tier,): size for tier, size in from_.facts.index_map_bytes.items()},
    ),
)
LOSSES = (
    Metric(
        "evicted_blocks_total",
        "counter",
        "Copies dropped from a tier, by what got their space: a `save`, a `load`, a `prefetch` or hint, a "
        "`read_ahead`, a `copy` from the tier above, the `free_share` that is kept free, the `index`; or on `request`.",
        'Evictions from the last tier lose blocks: see `lookup_misses_total{reason="evicted"}` whether they were '
        "needed again.",
        ("tier", "reason"),
        lambda from_: from_.gauges.evicted,
        ("evicted_dram_blocks", "evicted_ssd_blocks"),
    ),
    total(
        "lost_unwritten_blocks_total",
        "Blocks evicted from DRAM before they were on SSD.",
        "The SSD is slower than the saves, or the policy wants no copy.",
    ),
    total(
        "discarded_blocks_total",
        "Blocks dropped everywhere on request.",
        "It grows only after `kvctl discard`, or its RPC.",
    ),
    total(
        "quarantined_blocks_total",
        "Blocks quarantined because their bytes were damaged.",
        "Alert on any increase: check the drive and the memory, and scrub.",
    ),
    total("scrubbed_bytes_total", "Bytes that scrubs have verified.", "Whether a scrub runs, and how fast."),
    total(
        "verified_ahead_bytes_total",
        "Bytes that clients wrote into the arena, and that the daemon verified before a view asked for them.",
        "It grows only without SSD, and where clients take views: while no client reads or saves.",
    ),
    total(
        "storage_errors_total",
        "Reads, writes and commits that the operating system refused.",
        "Alert on any increase: the log names the file and the error.",
    ),
)
WRITES = (
    gauge(
        "unwritten_blocks",
        "Stored objects that only DRAM has.",
        "They are lost with the host's memory. It falls to near 0 between bursts, unless the policy wants no copy.",
        lambda s: s.gauges.unwritten_blocks,
    ),
    gauge(
        "unwritten_bytes",
        "Bytes of stored objects that only DRAM has.",
        "Over the capacity of DRAM: the share that cannot be evicted without a loss. Near 1, the SSD is slower than "
        "the saves.",
        lambda s: s.gauges.unwritten_bytes,
    ),
    Metric(
        "write_queue_blocks",
        "gauge",
        "Blocks that are queued or written to a tier.",
        "The time of a drain: these blocks over the rate of the tier's `written_behind_blocks_total`.",
        ("tier",),
        lambda from_: {(tier,): count for tier, count in from_.gauges.write_queue.items()},
    ),
    Metric(
        "written_behind_blocks_total",
        "counter",
        "Blocks copied to a tier from the one above it.",
        "The rate of write-behind.",
        ("tier",),
        lambda from_: {(tier,): from_.counters.tier_written_behind_blocks[tier] for tier in from_.tiers[1:]},
        ("written_behind_blocks",),
    ),
    total("written_behind_bytes_total", "Bytes copied to the next slower tier.", "The same in bytes."),
)
PROMOTIONS = (
    histogram(
        "promotion_seconds",
        "How long the reads of blocks that are copied to DRAM together took, by what they are for: a `load`, a "
        "`prefetch` or hint, a `read_ahead`.",
        'The slow part of `load_first_layer_seconds{tier="ssd"}`.',
        ("reason",),
        lambda from_: from_zero(_PROMOTED_FOR, from_.counters.promotion_times, Durations()),
    ),
    gauge(
        "promoting_blocks",
        "Blocks that are being copied to DRAM, or wait for it: the queue of reads.",
        "It stays high: the drive is slower than what loads and hints ask for.",
        lambda s: s.gauges.promoting_blocks,
    ),
    gauge(
        "promoting_bytes",
        "Bytes that are being copied to DRAM, of blocks that have their space there.",
        "Over the drive's bandwidth: how long a new load waits.",
        lambda s: s.gauges.promoting_bytes,
    ),
    total("promoted_blocks_total", "Blocks copied from a slower tier to DRAM.", "The rate of promotions."),
    total("promoted_bytes_total", "Bytes copied from a slower tier to DRAM.", "The same in bytes."),
    total(
        "read_ahead_blocks_total",
        "Blocks copied to DRAM because the policy expects their next use.",
        "0 with a policy that does not read ahead.",
    ),
    total(
        "read_ahead_bytes_total",
        "Bytes copied to DRAM because the policy expects their next use.",
        "The reads that the policy adds.",
    ),
    total(
        "read_ahead_unused_blocks_total",
        "Blocks that the policy read ahead, and that left DRAM before a request used them.",
        "Over `read_ahead_blocks_total`: the share of reads for nothing. Much of it: choose another policy.",
    ),
    total(
        "policy_failures_total",
        "Decisions that the placement policy was late with or failed at: recency decided.",
        "Alert if it grows steadily: the log has the reason.",
    ),
)
CUDA = (
    gauge(
        "cuda_ipc_offered",
        "1 while the daemon offers to copy to and from the GPU memory of engines (`cuda_ipc`).",
        "0 on a host with a GPU: `kvctl status` says why. After an error of CUDA it is 0 until the next start: alert.",
        lambda s: 0 if s.cuda_ipc.refused_because else 1,
    ),
    gauge(
        "cuda_ipc_registrations",
        "Workers of engines whose GPU memory is open in the daemon.",
        "Fewer than workers on this host: their logs say why, and which transport they use.",
        lambda s: s.cuda_ipc.registration_count,
    ),
    gauge(
        "cuda_ipc_registered_bytes",
        "Bytes of DRAM that GPUs copy from and to directly.",
        "It stays below the tier's capacity: the rest is copied twice. The log says why.",
        lambda s: s.cuda_ipc.arena_registered_bytes,
    ),
)
DAEMON = (
    Metric(
        "build_info",
        "gauge",
        "1: the daemon's version.",
        "Which version runs where.",
        ("version",),
        lambda from_: {(from_.version,): 1},
    ),
    Metric(
        "policy_info",
        "gauge",
        "1: the placement policy that decides now. `kvctl policy` changes it, so it is no label of `build_info`.",
        "Which policy runs where, and since when.",
        ("policy",),
        lambda from_: {(from_.gauges.policy,): 1},
    ),
    Metric(
        "state",
        "gauge",
        "1 for the daemon's state: `serving`; `draining`, while it refuses saves; `stopping`.",
        "A daemon that stays `draining`: `kvctl drain` was not undone.",
        ("state",),
        lambda from_: {(state,): float(state == from_.gauges.state) for state in STATES},
    ),
    histogram(
        "event_loop_delay_seconds",
        "How late a heartbeat of the event loop was. While it works there are up to 200 per second.",
        "All calls wait so long. Alert on the number above 20 ms ([monitoring](../monitoring.md)): a quantile "
        "does not show a stall, which is one of many heartbeats.",
        (),
        lambda from_: {(): from_.heartbeat.delays},
    ),
    histogram(
        "event_loop_own_delay_seconds",
        "How late a heartbeat of the event loop was, without the time for which its thread waited for a processor.",
        "Small while `event_loop_delay_seconds` is large: the host has too few processors.",
        (),
        lambda from_: {(): from_.heartbeat.own_delays},
    ),
    Metric(
        "event_loop_longest_delay_seconds",
        "gauge",
        "The longest delay of a heartbeat since the start. `all`: the whole delay; `own`: without the time for which "
        "the loop's thread waited for a processor.",
        "The longest stall of all calls. With `log.level` at `debug` the log has each of more than 10 ms.",
        ("part",),
        lambda from_: {
            ("all",): from_.heartbeat.latest_ms / 1000,
            ("own",): from_.heartbeat.own_latest_ms / 1000,
        },
    ),
    Metric(
        "tls_certificate_expires_seconds",
        "gauge",
        "When the certificate in use expires, in seconds since the epoch. Only with TLS.",
        "Alert some days before.",
        (),
        _certificate_expires,
    ),
    totals(
        "tls_reloads_total",
        "Times that changed TLS files were `loaded`, or `refused`: then the earlier ones stay in use.",
        "Alert on `refused`: see [security](../security.md).",
        "result",
        loaded="tls_reloads",
        refused="tls_reloads_refused",
    ),
)
