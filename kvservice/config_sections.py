"""Every setting: its description, unit, default and limits, in sections of one subject each.

A setting is a field of a section, such as ``server.address``. ``docs/configuration.md`` is generated from this file by
``make docs``. Rules for several settings together are in `config.Settings`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, Field

from kvservice.config_values import (
    GIB,
    KIB,
    MIB,
    AddressText,
    BulkAddressText,
    Paths,
    Section,
    Size,
    SocketText,
    setting,
)


class StoreSettings(Section):
    """The store's folder."""

    path: Path = setting(
        Path("kvservice-data"),
        "Folder of the store: its lock, the durable index and, unless `ssd.paths` is set, the SSD files. "
        "The daemon creates the folder if it is missing. A new store needs this setting.",
    )


class ServerSettings(Section):
    """How clients reach the daemon, and how much they may request."""

    address: AddressText = setting(
        "127.0.0.1:7070", "Where gRPC listens. Port 0 takes any free port.", unit="host:port", min_length=1
    )
    unix_socket: SocketText = setting(
        "",
        "UNIX socket where gRPC listens too. Empty means `kvservice.sock` in the store's folder, left out where that "
        "path is longer than the 107 bytes a socket's may have; `off` means none.",
        unit="path",
    )
    unix_socket_access: Literal["user", "group", "all"] = setting(
        "user",
        "Who may connect to the UNIX socket: processes of the daemon's user, of its group too, or of every user. "
        "It is never encrypted.",
    )
    insecure: bool = setting(
        False,
        "Allow addresses that other hosts can reach without TLS; `--insecure` for short. Traffic is not encrypted and "
        "clients are not authenticated: every host that reaches the address can read and drop all conversations.",
    )
    bulk_address: BulkAddressText = setting(
        "",
        "Where the bulk transport listens: KV bytes on plain or TLS sockets. Empty means the host of `address`, at the "
        "next higher port, or any free one if that is 0. If something else listens there, the daemon starts without a "
        "bulk port. `off` means none. Port 0 takes any free port. Clients connect to this port at the host of their "
        "gRPC address, so name the host of `address` or a wildcard (`0.0.0.0`, `[::]`).",
        unit="host:port",
    )
    bulk_connections_max: int = setting(
        256,
        "Connections of the bulk transport open at one time. A client with a round trip of 1 ms or more opens up to 8, "
        "so 32 such clients can use all 256; others open 1 or 2, and up to 4 for calls that they make at one time. "
        "Each takes one of the daemon's open files.",
        unit="connections",
        ge=1,
        le=100_000,
    )
    metrics_address: AddressText = setting(
        "127.0.0.1:9464",
        "Where Prometheus reads metrics, by HTTP at `/metrics`, and probes the health at `/healthz` (HTTPS with TLS). "
        "Empty means nowhere.",
        unit="host:port",
    )
    drain_timeout_s: float = setting(
        30.0, "How long running loads and saves may continue after SIGTERM.", unit="seconds", ge=0, le=86400
    )
    write_timeout_s: float = setting(
        0.0,
        "How long blocks that only DRAM has may be written to SSD after SIGTERM, once running loads and saves have "
        "ended. 0: they are not, and stay in shared memory for the next start.",
        unit="seconds",
        ge=0,
        le=86400,
    )
    clients_max: int = setting(
        1024, "Largest number of clients attached at the same time.", unit="clients", ge=1, le=1_000_000
    )
    loads_max: int = setting(
        256, "Loads open at one time. Further ones are refused with OVERLOADED.", unit="loads", ge=1, le=1_000_000
    )
    saves_max: int = setting(
        256, "Saves open at one time. Further ones are refused with OVERLOADED.", unit="saves", ge=1, le=1_000_000
    )
    transfer_idle_s: float = setting(
        60.0,
        "A load whose client takes nothing for this long, or over the bulk port less than 4 MiB, ends with "
        "DEADLINE_EXCEEDED, a save whose client sends nothing with INCOMPLETE_SAVE.",
        unit="seconds",
        gt=0,
        le=86400,
    )
    transfer_slots: int = setting(
        4,
        "Data streams that move bytes at one time; the others wait for their turn. More slots only make the event "
        "loop's turns longer.",
        unit="streams",
        ge=1,
        le=256,
    )
    frame_bytes: Size = setting(
        ByteSize(2 * MIB),
        "Largest frame sent or accepted. 1 to 2 MiB is fastest; gRPC's own limit is 4 MiB.",
        unit="bytes",
        ge=4 * KIB,
        le=3 * MIB,
    )
    keys_max: int = setting(16_384, "Block keys in one request.", unit="keys", ge=1, le=100_000)


class TlsSettings(Section):
    """TLS on each TCP port, gRPC, bulk and metrics, once a certificate is set. PEM files, read again as they change."""

    certificate: str = setting(
        "", "The daemon's certificate, then those between it and the CA that clients trust.", unit="path"
    )
    key: str = setting("", "The certificate's private key, without a passphrase.", unit="path")
    client_ca: str = setting(
        "",
        "CA certificates for clients. With it every client must show a certificate that one of them has signed.",
        unit="path",
    )


class DramSettings(Section):
    """The DRAM tier: one shared-memory file, the arena."""

    capacity_bytes: Size = setting(
        ByteSize(GIB),
        "Shared memory that the arena, its generations and the volatile index may take. If the file system has "
        "less, or a memory limit of the process's control groups allows less, the tier is smaller.",
        unit="bytes",
    )
    path: Path = setting(
        Path("/dev/shm"),
        "A tmpfs. Blocks in it survive a restart of the daemon, not of the host. In a container this is "
        "a volume in memory, for `/dev/shm` goes with the container.",
    )
    directory_bytes_max: Size = setting(
        ByteSize(256 * MIB),
        "Shared memory that the residency directory may take beside the arena, 64 to 128 bytes per block and half as "
        "much again while it grows. If it does not fit, or at 0, clients on this host look blocks up by a call.",
        unit="bytes",
    )
    share: Literal["writable", "read-only", "off"] = setting(
        "writable",
        "What clients on this host may do with the arena: read and write blocks in place, only read them, or neither. "
        "The files can be opened by the daemon's own user only. Clients that write in place trust one another.",
    )


class SsdSettings(Section):
    """The SSD tier: files that are allocated whole. A start with other settings resizes, adds or drains them."""

    capacity_bytes: Size = setting(
        ByteSize(10 * GIB), "Space that the files and the durable index may take. 0 means no SSD tier.", unit="bytes"
    )
    paths: Paths = setting(
        (),
        "Folders of the SSD files, one file each: one folder per drive. Empty means one file in the store's folder. As "
        "a flag or in the environment they are joined by colons.",
    )
    drained_paths: Paths = setting(
        (),
        "Folders of SSD files that are to leave the store. At the start their blocks move to the files of `ssd.paths`, "
        "as far as these have space, and the files are deleted.",
    )
    io_threads: int = setting(
        4,
        "Threads that read and write each file: the queue depth of its drive. Of two and more, writes leave a quarter, "
        "and at least one, to reads.",
        unit="threads",
        ge=1,
        le=256,
    )
    read_bytes: Size = setting(
        ByteSize(4 * MIB),
        "Size of one read, in whole layers of a block. The first layers are read in smaller pieces.",
        unit="bytes",
        ge=64 * KIB,
        le=64 * MIB,
    )
    write_bytes: Size = setting(
        ByteSize(4 * MIB),
        "Size of one write, in whole layers of a block.",
        unit="bytes",
        ge=64 * KIB,
        le=64 * MIB,
    )
    direct: Literal["auto", "off"] = setting(
        "auto", "`auto` goes past the page cache (O_DIRECT) where the file system can; `off` never does."
    )


class LowerTier(Section):
    """A tier below SSD."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")
    kind: str = "file"
    path: Path
    capacity_bytes: Annotated[Size, Field(ge=MIB)]
    io_threads: int = Field(4, ge=1, le=256)
    index_map_bytes: Size = ByteSize(0)
    free_low: float = Field(0.02, ge=0, lt=1)
    free_high: float = Field(0.05, ge=0, lt=1)

    def model_post_init(self, context: Any, /) -> None:
        if self.free_low > self.free_high:
            raise ValueError(f"free_low ({self.free_low}) is above free_high ({self.free_high})")


def _tiers_from_json(value: object) -> object:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"this is not JSON: {error}") from error
    if not isinstance(value, list | tuple):
        raise ValueError("give a list of tiers, in TOML as [[tiers.below_ssd]]")
    return value


class TierSettings(Section):
    """Tiers below SSD, for slower and larger media."""

    below_ssd: Annotated[tuple[LowerTier, ...], BeforeValidator(_tiers_from_json)] = setting(
        (),
        "Tiers from the fastest to the slowest. Each has a `name`, a `path`, `capacity_bytes`, and may have a `kind` "
        "(`file`: one preallocated file; or `module:Class`), `io_threads`, `free_low`, `free_high`, and "
        "`index_map_bytes`, the size of its index in the store's folder (0 means 1/256 of the capacity, 4 MiB to "
        "4 GiB). Every block on SSD is copied to the next tier soon. A tier that the last start did not have starts "
        "empty. As a flag or in the environment it is a JSON list.",
    )


class IndexSettings(Section):
    """The index of DRAM, in the arena's tmpfs, and that of SSD, on disk: two LMDB environments."""

    durable_map_bytes: Size = setting(
        ByteSize(0),
        "Size of the index of blocks on SSD, part of `ssd.capacity_bytes`. 0 means 1/64 of that, at least 4 MiB and "
        "at most 1 GiB. When the map is full, old blocks leave SSD, and until then saves with SSD durability are "
        "refused; a tenth of it is kept for sessions and layouts.",
        unit="bytes",
    )
    volatile_map_bytes: Size = setting(
        ByteSize(0),
        "Size of the index of blocks in DRAM, part of `dram.capacity_bytes`. 0 means 1/64 of that, within the same "
        "limits.",
        unit="bytes",
    )
    layouts_max: int = setting(
        256,
        "Layouts that the store knows at one time, of a few kilobytes each at most. Further ones are refused with "
        "INDEX_FULL until a start, which then forgets those without blocks.",
        unit="layouts",
        ge=1,
        le=100_000,
    )
    recency_flush_s: float = setting(
        60.0,
        "How often times of use are written to the index. After a crash, uses since then are not known.",
        unit="seconds",
        ge=1,
        le=86400,
    )


class MoverSettings(Section):
    """What stays stored, and what is copied between the tiers."""

    policy: Literal["lru", "fifo", "s3fifo", "lookahead", "foresight"] = setting(
        "foresight", "Which blocks are evicted first when a tier is full, and which are read ahead (docs/policies.md)."
    )
    dram_free_low: float = setting(0.05, "Eviction from DRAM starts below this.", unit="free share", ge=0, lt=1)
    dram_free_high: float = setting(0.1, "Eviction from DRAM stops above this.", unit="free share", ge=0, lt=1)
    ssd_free_low: float = setting(0.02, "Eviction from SSD starts below this.", unit="free share", ge=0, lt=1)
    ssd_free_high: float = setting(0.05, "Eviction from SSD stops above this.", unit="free share", ge=0, lt=1)
    writes_in_flight: int = setting(
        4, "Blocks copied to SSD at one time, for each drive, and to each tier below it.", unit="blocks", ge=1, le=1024
    )
    reads_in_flight: int = setting(
        8,
        "Reads of promotions that are queued or run at one time, for each SSD drive: more than `ssd.io_threads`, so "
        "that no thread waits for the event loop.",
        unit="reads",
        ge=1,
        le=1024,
    )


class LeaseSettings(Section):
    """Leases: clients hold blocks in their place for a time."""

    ttl_max_s: float = setting(300.0, "Longest lease granted.", unit="seconds", gt=0, le=86400)
    per_client_max: int = setting(1024, "Leases one client may hold.", unit="leases", ge=1, le=1_000_000)
    blocks_per_client_max: int = setting(
        262_144,
        "Blocks that one client's leases may hold, counted once per lease. Further lookups with a lease are "
        "refused with OVERLOADED.",
        unit="blocks",
        ge=1,
        le=100_000_000,
    )


class PinSettings(Section):
    """Blocks that operators pin (`kvctl pin`)."""

    ttl_max_s: float = setting(30 * 86400.0, "Longest pin granted.", unit="seconds", gt=0, le=3660 * 86400)
    fraction_max: float = setting(
        0.5,
        "Share of a tier that pinned blocks may take: of SSD all of them together, of DRAM those without a copy on "
        "SSD. A pin past it is refused with PINS_FULL.",
        unit="share",
        ge=0,
        le=1,
    )


class HistorySettings(Section):
    """What `kvctl explain` knows of deleted blocks and of requests. In memory only."""

    events_max: int = setting(
        262_144,
        "Events kept: why blocks left a tier or were not stored. Each takes 77 to 85 bytes. 0 means none.",
        unit="events",
        ge=0,
        le=4_194_304,
    )
    requests_max: int = setting(
        4096, "Requests kept: lookups that carry a request id. 0 means none.", unit="requests", ge=0, le=1_000_000
    )


class SessionSettings(Section):
    """Conversations whose history the daemon keeps by name."""

    ttl_s: float = setting(
        3600.0, "A session that no client used for this long is deleted.", unit="seconds", ge=1, le=365 * 86400
    )
    sessions_max: int = setting(
        16_384, "Sessions kept at one time. Further ones are refused with SESSIONS_FULL.", unit="sessions", ge=1,
        le=100_000,
    )  # fmt: skip
    slices_max: int = setting(
        8192,
        "Slices of one session: its blocks, and one more for each piece that a truncation makes. No more than "
        "`server.keys_max` of use.",
        unit="slices",
        ge=1,
        le=16_384,
    )


class HintSettings(Section):
    """Hints of engines: their queues, and what the daemon does because of them."""

    queued_requests_max: int = setting(
        8192,
        "Requests in the queue of one client. Further ones are ignored and counted.",
        unit="requests",
        ge=1,
        le=1_000_000,
    )
    queued_keys_max: int = setting(
        262_144,
        "Block keys in the queue of one client, of 32 bytes each. A request that would exceed them is ignored and "
        "counted.",
        unit="keys",
        ge=1,
        le=16_777_216,
    )
    dram_share: float = setting(
        0.5,
        "Share of DRAM that blocks may take because of hints. Clients with a queue have equal parts of it. 0: hints "
        "promote nothing.",
        unit="share",
        ge=0,
        le=0.9,
    )
    bytes_per_second: Size = setting(
        ByteSize(2 * GIB),
        "How much is promoted because of hints, of all clients together. 0 means nothing.",
        unit="bytes per second",
    )


class ScrubSettings(Section):
    """The scrub reads all blocks again to find damage."""

    bytes_per_second: Size = setting(
        ByteSize(200 * MIB), "Reading speed of a scrub whose request names no speed.", unit="bytes per second", ge=1
    )


class CudaSettings(Section):
    """GPUs: copies between DRAM and the KV pages of engines on this host (`cuda_ipc`)."""

    enabled: Literal["auto", "off"] = setting(
        "auto",
        "`auto`: offer `cuda_ipc` where CuPy (extra `cuda13` or `cuda12`) and a GPU are there. `off`: never use CUDA.",
    )
    staging_bytes: Size = setting(
        ByteSize(128 * MIB),
        "GPU memory that the daemon takes for each registration, which is one per worker of an engine, and as much "
        "pinned memory of the host. A quarter of it must hold one layer of a block.",
        unit="bytes",
        ge=4 * MIB,
    )
    registrations_max: int = setting(4, "Registrations of GPU memory per client.", unit="registrations", ge=1, le=1024)


class TracingSettings(Section):
    """Distributed traces: [tracing](tracing.md)."""

    enabled: bool = setting(
        False,
        "Export spans of calls that belong to a trace which their client records. Needs the extra `otel`. "
        "OpenTelemetry's own variables, such as `OTEL_EXPORTER_OTLP_ENDPOINT`, say where they are sent.",
    )


class LogSettings(Section):
    """Logs go to standard error, one line per event."""

    level: Literal["debug", "info", "warning", "error"] = setting("info", "Lowest severity that is written.")
    format: Literal["json", "text"] = setting("json", "`json` for machines, `text` for people.")
