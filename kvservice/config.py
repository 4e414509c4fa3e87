"""Every setting: its description, unit, default and limits.

A setting is a field of a section, such as ``server.address``. `config_sources` reads their values.
``docs/configuration.md`` is generated from this file by ``make docs``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from kvservice_api.address import SOCKET_PATH_BYTES_MAX, parse_listen_address, parse_listen_socket

KIB, MIB, GIB = 2**10, 2**20, 2**30
_SIZE_MAX = 2**60
_MAP_BYTES_MIN, _MAP_BYTES_MAX, _LOWER_MAP_BYTES_MAX = 4 * MIB, 1 * GIB, 4 * GIB


class ConfigError(ValueError):
    """The configuration cannot be used. The message names the setting and where it came from."""


def _checked_address(text: str) -> str:
    if text:
        parse_listen_address(text)
    return text


def _checked_socket(text: str) -> str:
    return parse_listen_socket(text).path if text not in ("", "off") else text


def _split_paths(value: object) -> object:
    return [part for part in value.split(os.pathsep) if part] if isinstance(value, str) else value


def _sized(value: object, parse: ValidatorFunctionWrapHandler) -> object:
    try:
        return parse(value)
    except ValidationError as error:
        kind = error.errors()[0]["type"]
        if kind == "less_than_equal" and error.errors()[0]["ctx"]["le"] == _SIZE_MAX:
            raise ValueError(f"{value} is more than 1 EiB") from None
        if not kind.startswith("byte_size"):
            raise
        raise ValueError(
            f"{str(value)!r} is not a size: give bytes, or a number with KiB, MiB, GiB, TiB (1024 each) or KB, MB, GB, "
            "TB (1000 each)"
        ) from None


AddressText = Annotated[str, AfterValidator(_checked_address)]
SocketText = Annotated[str, AfterValidator(_checked_socket)]
Paths = Annotated[tuple[Path, ...], BeforeValidator(_split_paths)]
Size = Annotated[ByteSize, Field(ge=0, le=_SIZE_MAX), WrapValidator(_sized)]


def _setting(default: object, description: str, *, unit: str = "", **limits: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"unit": unit}, **limits)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, hide_input_in_errors=True)


class StoreSettings(_Section):
    """The store's folder."""

    path: Path = _setting(
        Path("kvservice-data"),
        "Folder of the store: its lock, the durable index and, unless `ssd.paths` is set, the SSD files. "
        "The daemon creates the folder if it is missing. A new store needs this setting.",
    )


class ServerSettings(_Section):
    """How clients reach the daemon, and how much they may request."""

    address: AddressText = _setting(
        "127.0.0.1:7070", "Where gRPC listens. Port 0 takes any free port.", unit="host:port", min_length=1
    )
    unix_socket: SocketText = _setting(
        "",
        "UNIX socket where gRPC listens too. Empty means `kvservice.sock` in the store's folder, left out where that "
        "path is longer than the 107 bytes a socket's may have; `off` means none.",
        unit="path",
    )
    unix_socket_access: Literal["user", "group", "all"] = _setting(
        "user",
        "Who may connect to the UNIX socket: processes of the daemon's user, of its group too, or of every user. "
        "It is never encrypted.",
    )
    insecure: bool = _setting(
        False,
        "Allow addresses that other hosts can reach without TLS; `--insecure` for short. Traffic is not encrypted and "
        "clients are not authenticated: every host that reaches the address can read and drop all conversations.",
    )
    metrics_address: AddressText = _setting(
        "127.0.0.1:9464",
        "Where Prometheus reads metrics, by HTTP at `/metrics`, and probes the health at `/healthz` (HTTPS with TLS). "
        "Empty means nowhere.",
        unit="host:port",
    )
    drain_timeout_s: float = _setting(
        30.0, "How long running loads and saves may continue after SIGTERM.", unit="seconds", ge=0, le=86400
    )
    write_timeout_s: float = _setting(
        0.0,
        "How long blocks that only DRAM has may be written to SSD after SIGTERM, once running loads and saves have "
        "ended. 0: they are not, and stay in shared memory for the next start.",
        unit="seconds",
        ge=0,
        le=86400,
    )
    clients_max: int = _setting(
        1024, "Largest number of clients attached at the same time.", unit="clients", ge=1, le=1_000_000
    )
    loads_max: int = _setting(
        256, "Loads open at one time. Further ones are refused with OVERLOADED.", unit="loads", ge=1, le=1_000_000
    )
    saves_max: int = _setting(
        256, "Saves open at one time. Further ones are refused with OVERLOADED.", unit="saves", ge=1, le=1_000_000
    )
    transfer_idle_s: float = _setting(
        60.0,
        "A load whose client takes nothing for this long ends with DEADLINE_EXCEEDED, a save whose client sends "
        "nothing with INCOMPLETE_SAVE.",
        unit="seconds",
        gt=0,
        le=86400,
    )
    transfer_slots: int = _setting(
        4,
        "Data streams that move bytes at one time; the others wait for their turn. More slots only make the event "
        "loop's turns longer.",
        unit="streams",
        ge=1,
        le=256,
    )
    frame_bytes: Size = _setting(
        ByteSize(MIB),
        "Largest frame sent or accepted. 1 to 2 MiB is fastest; gRPC's own limit is 4 MiB.",
        unit="bytes",
        ge=4 * KIB,
        le=3 * MIB,
    )
    keys_max: int = _setting(16_384, "Block keys in one request.", unit="keys", ge=1, le=100_000)


class TlsSettings(_Section):
    """TLS on every TCP port, gRPC and metrics, once a certificate is set. PEM files, read again as they change."""

    certificate: str = _setting(
        "", "The daemon's certificate, then those between it and the CA that clients trust.", unit="path"
    )
    key: str = _setting("", "The certificate's private key, without a passphrase.", unit="path")
    client_ca: str = _setting(
        "",
        "CA certificates for clients. With it every client must show a certificate that one of them has signed.",
        unit="path",
    )


class DramSettings(_Section):
    """The DRAM tier: one shared-memory file, the arena."""

    capacity_bytes: Size = _setting(
        ByteSize(GIB),
        "Shared memory that the arena, its generations and the volatile index may take. If the file system has "
        "less, or a memory limit of the process's control groups allows less, the tier is smaller.",
        unit="bytes",
    )
    path: Path = _setting(
        Path("/dev/shm"),
        "A tmpfs. Blocks in it survive a restart of the daemon, not of the host. In a container this is "
        "a volume in memory, for `/dev/shm` goes with the container.",
    )
    directory_bytes_max: Size = _setting(
        ByteSize(256 * MIB),
        "Shared memory that the residency directory may take beside the arena, 64 to 128 bytes per block and half as "
        "much again while it grows. If it does not fit, or at 0, clients on this host look blocks up by a call.",
        unit="bytes",
    )
    share: Literal["writable", "read-only", "off"] = _setting(
        "writable",
        "What clients on this host may do with the arena: read and write blocks in place, only read them, or neither. "
        "The files can be opened by the daemon's own user only. Clients that write in place trust one another.",
    )


class SsdSettings(_Section):
    """The SSD tier: files that are allocated whole. A start with other settings resizes, adds or drains them."""

    capacity_bytes: Size = _setting(
        ByteSize(10 * GIB), "Space that the files and the durable index may take. 0 means no SSD tier.", unit="bytes"
    )
    paths: Paths = _setting(
        (),
        "Folders of the SSD files, one file each: one folder per drive. Empty means one file in the store's folder. As "
        "a flag or in the environment they are joined by colons.",
    )
    drained_paths: Paths = _setting(
        (),
        "Folders of SSD files that are to leave the store. At the start their blocks move to the files of `ssd.paths`, "
        "as far as these have space, and the files are deleted.",
    )
    io_threads: int = _setting(4, "Threads that read and write the files.", unit="threads", ge=1, le=256)
    direct: Literal["auto", "off"] = _setting(
        "auto", "`auto` goes past the page cache (O_DIRECT) where the file system can; `off` never does."
    )


class LowerTier(_Section):
    """A tier below SSD."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")
    kind: str = "file"
    path: Path
    capacity_bytes: Annotated[ByteSize, Field(ge=MIB)]
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


class TierSettings(_Section):
    """Tiers below SSD, for slower and larger media."""

    below_ssd: Annotated[tuple[LowerTier, ...], BeforeValidator(_tiers_from_json)] = _setting(
        (),
        "Tiers from the fastest to the slowest. Each has a `name`, a `path`, `capacity_bytes`, and may have a `kind` "
        "(`file`: one preallocated file; or `module:Class`), `io_threads`, `free_low`, `free_high`, and "
        "`index_map_bytes`, the size of its index in the store's folder (0 means 1/256 of the capacity, 4 MiB to "
        "4 GiB). Every block on SSD is copied to the next tier soon. A tier that the last start did not have starts "
        "empty. As a flag or in the environment it is a JSON list.",
    )


class IndexSettings(_Section):
    """The index of DRAM, in the arena's tmpfs, and that of SSD, on disk: two LMDB environments."""

    durable_map_bytes: Size = _setting(
        ByteSize(0),
        "Size of the index of blocks on SSD, part of `ssd.capacity_bytes`. 0 means 1/64 of that, at least 4 MiB and "
        "at most 1 GiB. A full map refuses saves and nothing else.",
        unit="bytes",
    )
    volatile_map_bytes: Size = _setting(
        ByteSize(0),
        "Size of the index of blocks in DRAM, part of `dram.capacity_bytes`. 0 means 1/64 of that, within the same "
        "limits.",
        unit="bytes",
    )
    layouts_max: int = _setting(
        256,
        "Layouts that the store knows at one time, of a few kilobytes each at most. Further ones are refused with "
        "INDEX_FULL until a start, which then forgets those without blocks.",
        unit="layouts",
        ge=1,
        le=100_000,
    )
    recency_flush_s: float = _setting(
        60.0,
        "How often times of use are written to the index. After a crash, uses since then are not known.",
        unit="seconds",
        ge=1,
        le=86400,
    )


class MoverSettings(_Section):
    """What stays stored, and what is copied between the tiers."""

    policy: Literal["lru", "fifo", "s3fifo", "lookahead", "foresight"] = _setting(
        "foresight", "Which blocks are evicted first when a tier is full, and which are read ahead (docs/policies.md)."
    )
    dram_free_low: float = _setting(0.05, "Eviction from DRAM starts below this.", unit="free share", ge=0, lt=1)
    dram_free_high: float = _setting(0.1, "Eviction from DRAM stops above this.", unit="free share", ge=0, lt=1)
    ssd_free_low: float = _setting(0.02, "Eviction from SSD starts below this.", unit="free share", ge=0, lt=1)
    ssd_free_high: float = _setting(0.05, "Eviction from SSD stops above this.", unit="free share", ge=0, lt=1)
    writes_in_flight: int = _setting(4, "Blocks copied to SSD at one time.", unit="blocks", ge=1, le=1024)
    reads_in_flight: int = _setting(4, "Blocks copied up to DRAM at one time.", unit="blocks", ge=1, le=1024)


class LeaseSettings(_Section):
    """Leases: clients hold blocks in their place for a time."""

    ttl_max_s: float = _setting(300.0, "Longest lease granted.", unit="seconds", gt=0, le=86400)
    per_client_max: int = _setting(1024, "Leases one client may hold.", unit="leases", ge=1, le=1_000_000)
    blocks_per_client_max: int = _setting(
        262_144,
        "Blocks that one client's leases may hold, counted once per lease. Further lookups with a lease are "
        "refused with OVERLOADED.",
        unit="blocks",
        ge=1,
        le=100_000_000,
    )


class PinSettings(_Section):
    """Blocks that operators pin (`kvctl pin`)."""

    ttl_max_s: float = _setting(30 * 86400.0, "Longest pin granted.", unit="seconds", gt=0, le=3660 * 86400)
    fraction_max: float = _setting(
        0.5,
        "Share of a tier that pinned blocks may take: of SSD all of them together, of DRAM those without a copy on "
        "SSD. A pin past it is refused with PINS_FULL.",
        unit="share",
        ge=0,
        le=1,
    )


class HistorySettings(_Section):
    """What `kvctl explain` knows of deleted blocks and of requests. In memory only."""

    events_max: int = _setting(
        262_144,
        "Events kept: why blocks left a tier or were not stored. Each takes 77 to 85 bytes. 0 means none.",
        unit="events",
        ge=0,
        le=4_194_304,
    )
    requests_max: int = _setting(
        4096, "Requests kept: lookups that carry a request id. 0 means none.", unit="requests", ge=0, le=1_000_000
    )


class SessionSettings(_Section):
    """Conversations whose history the daemon keeps by name."""

    ttl_s: float = _setting(
        3600.0, "A session that no client used for this long is deleted.", unit="seconds", ge=1, le=365 * 86400
    )
    sessions_max: int = _setting(
        16_384, "Sessions kept at one time. Further ones are refused with SESSIONS_FULL.", unit="sessions", ge=1,
        le=100_000,
    )  # fmt: skip
    slices_max: int = _setting(
        8192,
        "Slices of one session: its blocks, and one more for each piece that a truncation makes. No more than "
        "`server.keys_max` of use.",
        unit="slices",
        ge=1,
        le=16_384,
    )


class HintSettings(_Section):
    """Hints of engines: their queues, and what the daemon does because of them."""

    queued_requests_max: int = _setting(
        8192,
        "Requests in the queue of one client. Further ones are ignored and counted.",
        unit="requests",
        ge=1,
        le=1_000_000,
    )
    queued_keys_max: int = _setting(
        262_144,
        "Block keys in the queue of one client, of 32 bytes each. A request that would exceed them is ignored and "
        "counted.",
        unit="keys",
        ge=1,
        le=16_777_216,
    )
    dram_share: float = _setting(
        0.5,
        "Share of DRAM that blocks may take because of hints. Clients with a queue have equal parts of it. 0: hints "
        "promote nothing.",
        unit="share",
        ge=0,
        le=0.9,
    )
    bytes_per_second: Size = _setting(
        ByteSize(2 * GIB),
        "How much is promoted because of hints, of all clients together. 0 means nothing.",
        unit="bytes per second",
    )


class ScrubSettings(_Section):
    """The scrub reads all blocks again to find damage."""

    bytes_per_second: Size = _setting(
        ByteSize(200 * MIB), "Reading speed of a scrub whose request names no speed.", unit="bytes per second", ge=1
    )


class TracingSettings(_Section):
    """Distributed traces: [tracing](tracing.md)."""

    enabled: bool = _setting(
        False,
        "Export spans of calls that belong to a trace which their client records. Needs the extra `otel`. "
        "OpenTelemetry's own variables, such as `OTEL_EXPORTER_OTLP_ENDPOINT`, say where they are sent.",
    )


class LogSettings(_Section):
    """Logs go to standard error, one line per event."""

    level: Literal["debug", "info", "warning", "error"] = _setting("info", "Lowest severity that is written.")
    format: Literal["json", "text"] = _setting("json", "`json` for machines, `text` for people.")


class Settings(BaseSettings):
    """All settings of a daemon. They do not change while the daemon runs."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    store: StoreSettings = StoreSettings()
    server: ServerSettings = ServerSettings()
    tls: TlsSettings = TlsSettings()
    dram: DramSettings = DramSettings()
    ssd: SsdSettings = SsdSettings()
    tiers: TierSettings = TierSettings()
    index: IndexSettings = IndexSettings()
    mover: MoverSettings = MoverSettings()
    leases: LeaseSettings = LeaseSettings()
    pins: PinSettings = PinSettings()
    history: HistorySettings = HistorySettings()
    session: SessionSettings = SessionSettings()
    hints: HintSettings = HintSettings()
    scrub: ScrubSettings = ScrubSettings()
    tracing: TracingSettings = TracingSettings()
    log: LogSettings = LogSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is handed in: `load_settings` reads the sources, so that an error can say which one is wrong."""
        return (init_settings,)

    def model_post_init(self, context: Any, /) -> None:
        if bool(self.tls.certificate) != bool(self.tls.key):
            raise ValueError("tls.certificate and tls.key go together: one is set and the other is not")
        if self.tls.client_ca and not self.tls.certificate:
            raise ValueError("tls.client_ca has an effect only together with tls.certificate and tls.key")
        is_protected = bool(self.tls.certificate) or self.server.insecure
        for name in ("address", "metrics_address"):
            address = getattr(self.server, name)
            if address and not is_protected and not parse_listen_address(address).is_loopback:
                raise ValueError(
                    f"server.{name} {address} can be reached from other hosts, without encryption or login; "
                    "set tls.certificate and tls.key, or server.insecure if that is wanted"
                )
        for tier in ("dram", "ssd"):
            low, high = getattr(self.mover, f"{tier}_free_low"), getattr(self.mover, f"{tier}_free_high")
            if low > high:
                raise ValueError(f"mover.{tier}_free_low ({low}) is above mover.{tier}_free_high ({high})")
        for name, map_name, map_bytes in (
            ("dram", "volatile", self.volatile_map_bytes),
            ("ssd", "durable", self.durable_map_bytes),
        ):
            capacity_bytes = getattr(self, name).capacity_bytes
            if map_bytes < MIB:
                raise ValueError(f"index.{map_name}_map_bytes is {map_bytes}; an index needs 1 MiB at least")
            if 0 < capacity_bytes <= map_bytes or (name == "dram" and not capacity_bytes):
                raise ValueError(
                    f"{name}.capacity_bytes ({capacity_bytes}) leaves nothing for blocks: "
                    f"the index takes {map_bytes} bytes of it"
                )
        folders = {path.absolute() for path in self.ssd_directories}
        both = folders & {path.absolute() for path in self.ssd.drained_paths}
        if both and self.ssd.capacity_bytes:
            named = "in ssd.paths" if self.ssd.paths else "the store's folder, which an empty ssd.paths means,"
            raise ValueError(f"{min(both)} is {named} and in ssd.drained_paths: remove it from one of them")
        if len(folders) < len(self.ssd_directories):
            raise ValueError("ssd.paths names a folder twice: give each drive one folder")
        for lower in self.tiers.below_ssd:
            if self.lower_map_bytes(lower) < MIB:
                raise ValueError(f"tiers.below_ssd: index_map_bytes of {lower.name} is less than 1 MiB")
        names = [tier.name for tier in self.tiers.below_ssd]
        if names and not self.ssd.capacity_bytes:
            raise ValueError("tiers.below_ssd needs an SSD tier: ssd.capacity_bytes is 0")
        paths = [tier.path.absolute() for tier in self.tiers.below_ssd]
        if len(set(paths)) != len(paths):
            raise ValueError(f"tiers.below_ssd: every tier needs its own path: {', '.join(map(str, paths))}")
        if len({*names, "dram", "ssd"}) != len(names) + 2:
            raise ValueError(f"tiers.below_ssd: every tier needs its own name: dram, ssd, {', '.join(names)}")

    @property
    def durable_map_bytes(self) -> int:
        return self.index.durable_map_bytes or _auto_map_bytes(self.ssd.capacity_bytes)

    @property
    def volatile_map_bytes(self) -> int:
        return self.index.volatile_map_bytes or _auto_map_bytes(self.dram.capacity_bytes)

    def lower_map_bytes(self, tier: LowerTier) -> int:
        """The size of the index of a tier below SSD."""
        return tier.index_map_bytes or min(max(_MAP_BYTES_MIN, tier.capacity_bytes // 256), _LOWER_MAP_BYTES_MAX)

    @property
    def ssd_directories(self) -> tuple[Path, ...]:
        return self.ssd.paths or (self.store.path,)

    @property
    def unix_socket_path(self) -> Path | None:
        name = self._unix_socket_name
        is_usable = name != "off" and len(name.encode()) <= SOCKET_PATH_BYTES_MAX
        return Path(name) if is_usable else None

    @property
    def _unix_socket_name(self) -> str:
        return self.server.unix_socket or str((self.store.path / "kvservice.sock").absolute())


def _auto_map_bytes(capacity_bytes: int) -> int:
    return min(max(_MAP_BYTES_MIN, capacity_bytes // 64), _MAP_BYTES_MAX)
