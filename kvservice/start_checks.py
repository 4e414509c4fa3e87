"""Whether the machine has what the settings name, before a daemon makes or changes a file.

A start that fails later leaves files behind: gigabytes of an SSD file, and a folder for a misspelled path.
"""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from pathlib import Path

from kvservice.config import ConfigError, Settings
from kvservice.config_values import GIB, MIB
from kvservice.index.environment import DATA_NAME
from kvservice.index.identity import traces_of_store
from kvservice.rpc.addresses import AddressUnusable, expect_no_listener, expect_usable
from kvservice.tiers.files import file_system_of
from kvservice_api.address import parse_listen_address

_MAPPED_MAX = 2**46  # A process has twice as much address space on usual 64-bit hosts.


class NotThere(RuntimeError):
    """The machine does not have what a setting names, for now: a drive may be mounted later. The message says what."""


def check_start(settings: Settings) -> None:
    """Raises ConfigError, NotThere or AddressUnusable, with the name of the setting and what to do. Changes nothing."""
    addresses = {name: getattr(settings.server, name) for name in ("address", "metrics_address")}
    for name, address in addresses.items():
        if address:
            expect_usable(f"server.{name}", address)
    if settings.server.bulk_address not in ("", "off"):
        expect_usable("server.bulk_address", settings.server.bulk_address)
    listens, shows = (parse_listen_address(text) if text else None for text in addresses.values())
    if listens == shows and listens is not None and listens.port:
        raise AddressUnusable("server.metrics_address", addresses["metrics_address"], "server.address is the same")
    store = settings.store.path.absolute()
    is_new = not (store / "index" / DATA_NAME).exists() and not traces_of_store(store / "index")
    if is_new and "path" not in settings.store.model_fields_set:
        raise ConfigError(
            "store.path is not set: name the store's folder, such as --store.path /var/lib/kvservice. A new store "
            f"takes {_text(int(settings.ssd.capacity_bytes))} of its disk at once (ssd.capacity_bytes)"
        )
    if store.exists():
        _expect_folder("store.path", store)
    else:
        _expect_folder("store.path", store.parent, f"{store} cannot be created: ")
    if settings.dram.path.exists() or not _is_in_memory(settings.dram.path.parent):
        _expect_folder("dram.path", settings.dram.path)
    if settings.dram.capacity_bytes > _MAPPED_MAX:
        raise ConfigError(
            f"dram.capacity_bytes: {_text(int(settings.dram.capacity_bytes))} cannot be mapped into memory"
        )
    if is_new:
        _expect_usable_socket(settings, store)
    if settings.ssd.capacity_bytes and is_new:
        for path in settings.ssd.paths:  # Of a store that was made before, the index knows which drives are missing.
            _expect_folder("ssd.paths", path)
    if settings.ssd.capacity_bytes:
        _expect_space(settings, store, is_new=is_new)


def _expect_usable_socket(settings: Settings, store: Path) -> None:
    path = settings.unix_socket_path
    if path is None:
        return
    if path.absolute().parent != store:  # The store's folder is made later.
        _expect_folder("server.unix_socket", path.absolute().parent)
    expect_no_listener(path)


def _is_in_memory(folder: Path) -> bool:
    """A folder there is made at each start: the host's restart removes it."""
    return folder.is_dir() and file_system_of(folder) in ("tmpfs", "ramfs", "hugetlbfs")


def _expect_folder(setting: str, path: Path, why: str = "") -> None:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise NotThere(f"{setting}: {why}there is no folder {path}; create it, or correct the setting") from None
    except OSError as error:
        raise NotThere(f"{setting}: {why}{path}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise NotThere(f"{setting}: {why}{path} is not a folder")
    is_read_only = os.statvfs(path).f_flag & os.ST_RDONLY  # That may be a disk's fault. The first write reports it.
    if not is_read_only and not os.access(path, os.W_OK | os.X_OK):
        raise NotThere(f"{setting}: {why}the user {os.geteuid()} may not write in {path}")


def _expect_space(settings: Settings, store: Path, *, is_new: bool) -> None:
    """The file systems have space for the SSD files of a new store, which are allocated at once, or for their growth.

    An old store's folder without a file may be that of a drive that is not mounted: the index knows.
    """
    folders = settings.ssd.paths or (store,)
    needed: dict[int, int] = defaultdict(int)  # By file system.
    place: dict[int, Path] = {}
    for folder in folders:
        files = sorted(folder.glob("ssd-*.kv"))
        if not files and not is_new:
            continue
        there = folder if folder.exists() else folder.parent
        device = there.stat().st_dev
        share = (int(settings.ssd.capacity_bytes) - settings.durable_map_bytes) // len(folders)
        needed[device] += max(0, share - sum(file.stat().st_size for file in files))
        place[device] = there
    for device, size in needed.items():
        found = os.statvfs(place[device])
        free = found.f_bavail * found.f_frsize
        if size > free:
            raise NotThere(
                f"ssd.capacity_bytes: the SSD tier needs {_text(size)} more in {place[device]}, and {_text(free)} "
                "are free there; make it smaller, or name other drives in ssd.paths"
            )


def _text(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB else f"{size_bytes / MIB:.0f} MiB"
