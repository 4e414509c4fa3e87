"""The metrics of what clients do: lookups, loads, saves, calls, sessions and hints."""

from __future__ import annotations

from itertools import product

from kvservice.counters import Durations
from kvservice.metrics.rows import PATHS, Metric, from_zero, gauge, histogram, total, totals
from kvservice.rpc.reports import OUTCOMES, PLANS
from kvservice.store.types import MISS_REASONS
from kvservice_api.errors import INTERNAL, ChecksumMismatch, DeadlineExceeded, Overloaded, StorageFailed

# With these, loads on the bulk port count in the alert KVServiceCallsFail, as calls with theirs (`rpc.calls.ALERTED`).
BULK_LOAD_ERRORS = (
    INTERNAL,
    *(each.reason for each in (ChecksumMismatch, DeadlineExceeded, Overloaded, StorageFailed)),
)

LOOKUPS = (
    histogram(
        "lookup_seconds",
        "How long lookups took in the store, without gRPC.",
        "If it grows, compare `event_loop_delay_seconds`: the daemon is too busy, or prompts are longer.",
        (),
        lambda from_: {(): from_.counters.lookup_times},
    ),
    Metric(
        "lookup_requested_blocks_total",
        "counter",
        "Blocks that lookups asked for. A client on this host answers some of its lookups itself, from the residency "
        "directory: the daemon does not count those.",
        "The divisor of the hit ratio: `rate(lookup_hit_blocks_total)` over it.",
        ("layout",),
        lambda from_: {(name,): from_.counters.asked_blocks[each] for each, name in from_.layouts.items()},
        ("lookup_blocks_asked",),
    ),
    Metric(
        "lookup_hit_blocks_total",
        "counter",
        "Blocks that lookups found, up to the first missing one, by their fastest tier.",
        "If most hits are in a slower tier, a larger DRAM tier makes loads faster.",
        ("layout", "tier"),
        lambda from_: {
            (name, tier): from_.counters.hit_blocks[each, tier]
            for each, name in from_.layouts.items()
            for tier in from_.tiers
        },
        ("lookup_blocks_hit",),
    ),
    Metric(
        "lookup_hit_tokens_total",
        "counter",
        "Tokens of the blocks that lookups found: what an engine need not compute. Each lookup of a prefix counts, so "
        "each rank does.",
        "The rate at which engines can reuse tokens.",
        ("layout",),
        lambda from_: {(name,): from_.counters.hit_tokens[each] for each, name in from_.layouts.items()},
    ),
    Metric(
        "lookup_misses_total",
        "counter",
        "Lookups that ended at a missing block, by the reason why that block is missing.",
        "The reasons are those of `kvctl explain`: see [operating](../operating.md#explain). New text is "
        "`never_stored`; for `evicted`, make the tier larger or pin; for `other_layout`, compare settings.",
        ("layout", "reason"),
        lambda from_: {
            (name, reason): from_.counters.misses[each, reason]
            for each, name in from_.layouts.items()
            for reason in MISS_REASONS
        },
    ),
)
LOADS = (
    histogram(
        "load_first_layer_seconds",
        "From the start of a load until the first layer of all its blocks is verified, in memory; `bulk`: and sent.",
        "The part of the time to first token that a load adds. `tier` is the slowest one that the load needs: if `ssd` "
        "is slow, see `promoting_blocks` and the drive.",
        ("path", "tier"),
        lambda from_: from_zero(product(PATHS, from_.tiers), from_.counters.first_layer_times, Durations()),
    ),
    histogram(
        "load_seconds",
        "From the start of a load until the client has all of it: for `stream` the last byte is handed to gRPC, for "
        "`bulk` to the kernel, for `in_place` the client ends the call. Not counted: loads that fail, and views that "
        "needed no call of their own, because the answer of their lookup had the places.",
        "If `stream` or `bulk` is slow and its first layer is not, the network or the client is slow.",
        ("path", "tier"),
        lambda from_: from_zero(product(PATHS, from_.tiers), from_.counters.load_times, Durations()),
    ),
    totals(
        "load_blocks_total",
        "Blocks that loads gave to clients: sent as a `stream` of gRPC or on a socket (`bulk`), read `in_place` in "
        "shared memory, or copied to their GPU (`cuda_ipc`).",
        "If `in_place` stays 0 with engines on this host, they do not map its memory: see `Client.stats().transports`.",
        "path",
        stream="load_blocks",
        in_place="located_blocks",
        cuda_ipc="device_blocks",
        bulk="bulk_blocks",
    ),
    totals(
        "load_bytes_total",
        "KV bytes of the blocks that loads gave to clients. For `in_place` it is what the client may read there.",
        "The bandwidth of loads.",
        "path",
        stream="load_bytes",
        in_place="located_bytes",
        cuda_ipc="device_bytes",
        bulk="bulk_bytes",
    ),
    totals(
        "load_tokens_total",
        "Tokens of the blocks that loads gave to clients: those that engines reuse. Each load of a part (a rank, a "
        "range of layers) counts.",
        "The rate of reused tokens: engines save the time to compute them.",
        "path",
        stream="load_tokens",
        in_place="located_tokens",
        cuda_ipc="device_tokens",
        bulk="bulk_tokens",
    ),
    total(
        "loads_failed_total",
        "Loads that ended with an error of the store.",
        "Any increase: for the reason see `rpc_errors_total` of `LoadBlocks`, `LocateBlocks` and `LoadToDevice`, and "
        "`bulk_transfers_total`.",
    ),
    total(
        "read_through_bytes_total",
        "Bytes that were sent from a slower tier because DRAM had no space for their blocks.",
        "Much of it: the DRAM tier is too small for the leases and saves that run.",
    ),
)
SAVES = (
    histogram(
        "save_seconds",
        "From the start of a save until its answer, with the time in which the client sends or writes the bytes.",
        '`durability="ssd"` waits for the SSD. If `dram` is slow, saves wait for space.',
        ("path", "durability"),
        lambda from_: from_zero(product(PATHS, ("dram", "ssd")), from_.counters.save_times, Durations()),
    ),
    totals(
        "save_blocks_total",
        "Blocks of saves that ended: `stored` now, stored before (`already_stored`), or `refused`.",
        "Many refused blocks: see their reasons.",
        "result",
        stored="save_blocks_stored",
        already_stored="save_blocks_already_stored",
        refused="save_blocks_refused",
    ),
    Metric(
        "save_refused_blocks_total",
        "counter",
        "Blocks that saves could not store, by the reason; also those of saves that were refused as a whole.",
        "`TIER_FULL`: writes to SSD do not keep up, or leases and pins fill the tier. `OVERLOADED`: too many saves. "
        "See [errors](../errors.md).",
        ("reason",),
        lambda from_: {(reason,): count for reason, count in from_.gauges.refused.items()},
    ),
    total("save_bytes_total", "KV bytes that saves stored.", "The rate of new KV; with it, size the tiers."),
    total(
        "saves_abandoned_total",
        "Saves that ended without a commit.",
        "An increase without restarts of engines: clients lose their connection.",
    ),
    gauge(
        "uploads",
        "Blocks that are being saved.",
        "It returns to 0; a drain waits for that.",
        lambda from_: from_.facts.uploads,
    ),
    Metric(
        "transfers_running",
        "gauge",
        "Loads and saves that run, by kind and path. Those of the bulk port count as `stream`.",
        "Near `transfers_max`, calls are refused as `OVERLOADED`.",
        ("kind", "path"),
        lambda from_: from_.gauges.transfers,
    ),
    Metric(
        "transfers_max",
        "gauge",
        "The limit of `transfers_running`, where there is one: `server.loads_max`, `server.saves_max`.",
        "Over it, the share of the limit that is in use.",
        ("kind", "path"),
        lambda from_: from_.gauges.transfers_max,
    ),
)
BULK = (
    gauge(
        "bulk_connections",
        "Connections of the bulk port that are open: those that carry a load or a save, and idle ones that clients "
        "keep for the next one and for their calls.",
        "Near `server.bulk_connections_max`, new ones are refused, and clients use gRPC.",
        lambda from_: from_.bulk.connection_count,
    ),
    Metric(
        "bulk_connections_accepted_total",
        "counter",
        "Connections that the bulk port has accepted.",
        "Many more than loads, saves and lookups: a program that is no client connects, or clients do not keep "
        "connections.",
        (),
        lambda from_: {(): from_.bulk.accepted},
    ),
    Metric(
        "bulk_refusals_total",
        "counter",
        "Connections that the bulk port refused or closed, and tickets that it refused, by reason: too "
        "many connections (`full`), no TLS (`handshake`), no message of this port (`garbage`), nothing said in time "
        "(`timeout`), broken off in a transfer or in the first message (`lost`), a wrong message in a save (`frame`), "
        "an error of the daemon (`internal`), and tickets that are `unknown`, `used`, `expired` or another client's "
        "(`foreign`).",
        "If `unknown`, `foreign`, `garbage` or `handshake` rises, find the program that connects, or the port that is "
        "mapped to another daemon. For "
        "`internal`, report the error in the log.",
        ("reason",),
        lambda from_: {(reason,): count for reason, count in from_.bulk.refused.copy().items()},
    ),
    Metric(
        "bulk_transfers_total",
        "counter",
        "Loads and saves on the bulk port that ended: `OK`, or the reason of their error.",
        "What to do about each reason: [errors](../errors.md). `INTERNAL` is a fault of the daemon: see its log.",
        ("kind", "result"),
        lambda from_: from_zero(product(("load",), BULK_LOAD_ERRORS), from_.bulk.ended.copy()),
    ),
    Metric(
        "bulk_socket_bytes_total",
        "counter",
        "Bytes that the bulk port has `received` and `sent`, with the headers of messages.",
        "The bandwidth between hosts. Compare it with the network's.",
        ("direction",),
        lambda from_: {
            (way,): count for way, count in zip(("received", "sent"), from_.bulk.moved_bytes(), strict=True)
        },
    ),
)
CALLS = (
    Metric(
        "rpc_calls_total",
        "counter",
        "RPCs that ended, by gRPC status code. A client ends a load in place as `CANCELLED`, and when it disconnects, "
        "all its calls.",
        "The rate of calls. The share of `UNAVAILABLE`, `RESOURCE_EXHAUSTED` and `INTERNAL` is for an alert.",
        ("method", "code"),
        lambda from_: dict(from_.calls.ended),
    ),
    Metric(
        "rpc_errors_total",
        "counter",
        "RPCs that ended with an error of the daemon, by its reason.",
        "What to do about each reason: [errors](../errors.md). `INTERNAL` is a fault of the daemon: see its log.",
        ("method", "reason"),
        lambda from_: dict(from_.calls.errors),
    ),
    Metric(
        "rpc_calls_running",
        "gauge",
        "RPCs that run. `Attach` and `Exchange` run as long as a client is connected.",
        "Calls that stay: clients that do not read, or a tier that hangs.",
        ("method",),
        lambda from_: {(method,): count for method, count in dict(from_.calls.running).items()},
    ),
)
CLIENTS = (
    gauge(
        "clients", "Attached clients.", "Fewer than engines run: one lost its connection.", lambda s: s.facts.clients
    ),
    gauge(
        "clients_max",
        "Clients that may be attached: `server.clients_max`.",
        "The limit of `clients`.",
        lambda s: s.facts.clients_max,
    ),
    gauge("leases", "Leases that run.", "Leased blocks cannot be evicted.", lambda s: s.facts.leases),
    total("leases_granted_total", "Leases granted.", "The rate of lookups whose blocks are to be loaded."),
    total(
        "leases_expired_total",
        "Leases that expired.",
        "Engines that do not release leases, or that wait longer than their leases last.",
    ),
    gauge("sessions", "Sessions.", "Near `sessions_max`, new ones are refused.", lambda s: s.facts.sessions),
    gauge(
        "sessions_max",
        "Sessions that the daemon keeps: `session.sessions_max`.",
        "The limit of `sessions`.",
        lambda s: s.facts.sessions_max,
    ),
    total("sessions_begun_total", "Sessions created or forked.", "The rate of new conversations."),
    total(
        "sessions_expired_total",
        "Sessions deleted because no client used them.",
        "Conversations that should last longer: raise `session.ttl_s`.",
    ),
    total(
        "session_changes_refused_total",
        "Changes of sessions refused because they started from another revision.",
        "Two engines write to one session.",
    ),
    Metric(
        "requests_reported_total",
        "counter",
        "Requests that engines reported, by plan and outcome.",
        "`failed_over` and `breaker_open` are requests that could not use the store.",
        ("plan", "outcome"),
        lambda from_: from_zero(product(PLANS.values(), OUTCOMES.values()), from_.facts.reported),
    ),
)
HINTS = (
    gauge(
        "hint_streams", "Clients that send hints.", "0 if no engine sends its queue.", lambda s: s.facts.hint_streams
    ),
    gauge(
        "queued_requests",
        "Requests in the queues that clients sent.",
        "The engines' load.",
        lambda s: s.facts.queued_requests,
    ),
    total("hints_received_total", "Queued requests and other hints that clients sent.", "Whether engines send hints."),
    totals(
        "hints_ignored_total",
        "Hints that were ignored: about a session that does not exist for the client (`unknown_session`), with a field "
        "that is not valid (`invalid`), or over a limit of the hints settings (`over_limit`).",
        "`invalid`: an engine of another version. `over_limit`: raise the limits.",
        "reason",
        unknown_session="hints_unknown",
        invalid="hints_invalid",
        over_limit="hints_over_limit",
    ),
    total(
        "hint_promoted_blocks_total",
        "Blocks copied to DRAM because of hints.",
        "What hints prepare for the next loads.",
    ),
    total(
        "hint_promoted_bytes_total", "Bytes copied to DRAM because of hints.", "Limited by `hints.bytes_per_second`."
    ),
    total(
        "hint_readiness_sent_total",
        "Changes of a queued request's readiness that were sent to clients.",
        "0: no engine asks which of its requests are ready.",
    ),
)
