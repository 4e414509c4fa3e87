"""All settings of a daemon together, the rules for several of them, and what follows from them.

`config_sections` has each setting; `config_sources` reads their values.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from kvservice.config_sections import (
    CudaSettings,
    DramSettings,
    HintSettings,
    HistorySettings,
    IndexSettings,
    LeaseSettings,
    LogSettings,
    LowerTier,
    MoverSettings,
    PinSettings,
    ScrubSettings,
    ServerSettings,
    SessionSettings,
    SsdSettings,
    StoreSettings,
    TierSettings,
    TlsSettings,
    TracingSettings,
)
from kvservice.config_values import GIB, MIB
from kvservice_api.address import SOCKET_PATH_BYTES_MAX, parse_listen_address

_MAP_BYTES_MIN, _MAP_BYTES_MAX, _LOWER_MAP_BYTES_MAX = 4 * MIB, 1 * GIB, 4 * GIB


class ConfigError(ValueError):
    """The configuration cannot be used. The message names the setting and where it came from."""


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
    cuda: CudaSettings = CudaSettings()
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
        for name in ("address", "bulk_address", "metrics_address"):
            address = getattr(self.server, name)
            if address not in ("", "off") and not is_protected and not parse_listen_address(address).is_loopback:
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
        folders = Counter(path.absolute() for path in self.ssd_directories)
        both = folders.keys() & {path.absolute() for path in self.ssd.drained_paths}
        if both and self.ssd.capacity_bytes:
            named = "in ssd.paths" if self.ssd.paths else "the store's folder, which an empty ssd.paths means,"
            raise ValueError(f"{min(both)} is {named} and in ssd.drained_paths: remove it from one of them")
        if twice := [str(path) for path, count in folders.items() if count > 1]:
            raise ValueError(f"ssd.paths names the folder {twice[0]} twice: give each drive one folder")
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
    def ssd_threads(self) -> int:
        """Of all drives together, also of those whose blocks leave."""
        return self.ssd.io_threads * (len(self.ssd_directories) + len(self.ssd.drained_paths))

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
