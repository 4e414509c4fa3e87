"""The key generations of a store: a number per tenant and layout, which engines put into the salt of their keys.

An engine whose weights have changed begins a new generation, and blocks of earlier ones are never found again. So a
number must not be forgotten, and not be used twice: it is random, and durable before it is used. The file is beside the
index, because a lost index must not take it along, and a full one must not prevent a new generation. If the file is
lost or damaged, all tenants and layouts get a generation that was never used.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import struct
from collections.abc import Mapping
from pathlib import Path
from zlib import crc32

from kvservice.durable_files import write_durably
from kvservice_api.errors import StorageFailed

log = logging.getLogger(__name__)

KEY_GENERATIONS_NAME = "key_generations"

_MAGIC = b"KVKGEN01"
_ENTRIES_MAX = 1024

#  | "KVKGEN01" | generation of all others u64 | (tenant u32 | fingerprint 32 | generation u64) ... | crc u32 |
#  little-endian; the crc over all before it
_HEAD = struct.Struct("<8sQ")
_ENTRY = struct.Struct("<I32sQ")
_CRC = struct.Struct("<I")

_Numbers = dict[tuple[int, bytes], int]  # By tenant and layout fingerprint.


class KeyGenerations:
    """The generations of one store. All methods are for the event loop's thread."""

    def __init__(self, path: Path, of_others: int = 0, numbers: Mapping[tuple[int, bytes], int] | None = None) -> None:
        """Use `open`. `of_others` is the generation of all tenants and layouts that are not in `numbers`."""
        self._path = path
        self._of_others = of_others
        self._numbers: _Numbers = dict(numbers or {})
        self._changing = asyncio.Lock()
        self.is_on_disk = True

    @classmethod
    def open(cls, store: Path, *, had_file: bool) -> KeyGenerations:
        """Read the store's file. If there is none, one is written, of new generations if the store `had_file` before.

        If it cannot be written, the generations are only in memory: the next start tries again. Raises StorageFailed if
        it cannot be read.
        """
        path = store / KEY_GENERATIONS_NAME
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            data = None
        except OSError as error:
            raise StorageFailed(f"{path} cannot be read: {error.strerror}") from error
        found = None if data is None else _decode(data)
        if found is not None:
            return cls(path, *found)
        is_lost = had_file or data is not None
        made = cls(path, _new_number() if is_lost else 0)
        if is_lost:
            log.warning(
                "the store's key generations are lost: %s was %s. All are new now: engines that use them do not find "
                "blocks that were saved before",
                path,
                "gone" if data is None else "damaged",
            )
        try:
            write_durably(path, made._encoded(made._of_others, made._numbers))
        except OSError as error:
            made.is_on_disk = False
            log.warning("the store's key generations could not be written: %s: %s", path, error.strerror)
        return made

    def of(self, tenant: int, fingerprint: bytes) -> int:
        """The generation of a layout for a tenant, by the tenant's number."""
        return self._numbers.get((tenant, fingerprint), self._of_others)

    async def begin(self, tenant: int, fingerprint: bytes) -> int:
        """Begin a generation; it is on disk on return. Raises StorageFailed. Not to be cancelled while it writes."""
        async with self._changing:
            of_others, numbers = self._of_others, self._numbers
            if len(numbers) >= _ENTRIES_MAX and (tenant, fingerprint) not in numbers:  # Bound the file.
                of_others, numbers = _new_number(), {}
            number = _new_number()
            numbers = {**numbers, (tenant, fingerprint): number}
            try:
                await asyncio.to_thread(write_durably, self._path, self._encoded(of_others, numbers))
            except OSError as error:
                raise StorageFailed(f"{self._path} could not be written: {error.strerror}") from error
            self._of_others, self._numbers = of_others, numbers
            return number

    @staticmethod
    def _encoded(of_others: int, numbers: _Numbers) -> bytes:
        entries = (_ENTRY.pack(tenant, fingerprint, number) for (tenant, fingerprint), number in numbers.items())
        body = _HEAD.pack(_MAGIC, of_others) + b"".join(entries)
        return body + _CRC.pack(crc32(body))


def _new_number() -> int:
    """A generation that was never used, in any store. Never 0."""
    return secrets.randbits(63) | 1


def _decode(data: bytes) -> tuple[int, _Numbers] | None:
    """None if the file is damaged."""
    body, crc = data[: -_CRC.size], data[-_CRC.size :]
    if len(body) < _HEAD.size or crc != _CRC.pack(crc32(body)) or (len(body) - _HEAD.size) % _ENTRY.size:
        return None
    magic, of_others = _HEAD.unpack_from(body)
    if magic != _MAGIC:
        return None
    entries = _ENTRY.iter_unpack(body[_HEAD.size :])
    return of_others, {(tenant, fingerprint): number for tenant, fingerprint, number in entries}
