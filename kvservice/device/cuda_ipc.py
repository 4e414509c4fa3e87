"""Loads and saves of clients on this host by CUDA IPC: the daemon copies between the arena and their GPU memory itself.

Called on the event loop, which never waits for CUDA: each registration has one thread for its CUDA calls. An error that
ends the process's use of CUDA ends this transport, and nothing else of the daemon.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import secrets
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kvservice.clock import Clock
from kvservice.device.page_memory import MemoryPlaces, check_places
from kvservice.device.registration import ChainOrder, LoadRun, PageLoad, Registration, UsedGpu
from kvservice.device.save_run import SaveRun
from kvservice.store.caller import Caller
from kvservice.store.store import BlockStore
from kvservice.store.tasks import Tasks
from kvservice.store.types import Client, Located, NotInPlace, SaveHeader, Span
from kvservice.tiers.files import on_thread
from kvservice_api.cuda.host_memory import PIECE_BYTES, HostMemory
from kvservice_api.cuda.layer_copies import Runs
from kvservice_api.cuda.page_kernels import PageKernels
from kvservice_api.cuda.runtime import Gpu, why_unavailable
from kvservice_api.errors import (
    DeviceUnavailable,
    InvalidRequest,
    KVError,
    NotShared,
    Overloaded,
    RegistrationEnded,
)
from kvservice_api.image import block_geometry
from kvservice_api.layout import Shard

log = logging.getLogger(__name__)

T = TypeVar("T")

_CLOSE_S = 5.0  # At the daemon's end, which is bounded (`kvservice.process`): files are closed after it.
_TURN_S = 0.002  # How long a registration's thread works for one load before others have their turn.


def why_cuda_is_off(enabled: str) -> str:
    """Why this daemon does not use CUDA; "" if it does. Takes the time of CuPy's import where CuPy is installed."""
    if enabled == "off":
        return "cuda.enabled is off"
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed: install the extra cuda13 or cuda12"
    return why_unavailable()


@dataclass(frozen=True, slots=True)
class ArenaMemory:
    """The arena for CUDA. `ready_bytes` of it are allocated; `grown` waits for more, and is False if none will come."""

    memory: NDArray[np.uint8]
    ready_bytes: Callable[[], int]
    grown: Callable[[], Awaitable[bool]]


@dataclass(slots=True, eq=False)
class _Open:
    """A client's registration, and its thread, which ends when no call refers to it any more."""

    client: Client
    registration: Registration
    thread: ThreadPoolExecutor
    on_detach: Callable[[], None]


class CudaIpc:
    """The transport of one daemon."""

    def __init__(
        self,
        store: BlockStore,
        arena: ArenaMemory,
        hashing: Executor,
        *,
        refused_because: str,
        staging_bytes: int,
        registrations_max: int,
    ) -> None:
        """`refused_because` says why CUDA is not used. `hashing` has threads for checksums."""
        self._store, self._arena, self._hashing = store, arena, hashing
        self.refused_because = refused_because
        self.has_failed = False  # It was offered before.
        self._staging_bytes, self._registrations_max = staging_bytes, registrations_max
        self._open: dict[int, _Open] = {}
        self._opening: dict[Client, int] = {}
        self._devices = _Devices()
        self._tasks = Tasks()
        self._is_arena_registering = False

    @property
    def registration_count(self) -> int:
        return len(self._open)

    @property
    def arena_registered_bytes(self) -> int:
        return self._devices.registered_bytes

    def check_offered(self) -> None:
        """Raises DeviceUnavailable."""
        if self.refused_because:
            raise DeviceUnavailable(f"this daemon does not use CUDA: {self.refused_because}")

    # Registrations

    async def register(self, caller: Caller, fingerprint: bytes, shard: Shard | None, places: MemoryPlaces) -> int:
        """Open a client's pages. Raises DeviceUnavailable, UnknownLayout, UnknownClient, InvalidRequest, Overloaded."""
        self.check_offered()
        layout = self._store.layouts.find(caller, fingerprint)
        client = self._store.leases.client(caller)
        shard = Shard.whole(layout) if shard is None else shard.check(layout)
        check_places(places, shard)
        held = self._opening.get(client, 0) + sum(each.client is client for each in self._open.values())
        if held >= self._registrations_max:
            raise Overloaded(f"the client has {held} registrations of GPU memory, the most it may have")
        number = secrets.randbits(63) | 1
        thread, made = ThreadPoolExecutor(1, thread_name_prefix="cuda-ipc"), list[Registration]()

        def make() -> None:
            device = self._devices.of(places.bus_id)
            made.append(Registration(device, places, layout, shard, staging_bytes=self._staging_bytes))

        self._opening[client] = self._opening.get(client, 0) + 1
        try:
            await self._on(thread, make)
            opened = self._open[number] = _Open(client, made.pop(), thread, partial(self._detached, number))
        finally:
            if made:  # The client has cancelled the call.
                thread.submit(made[0].close)
            if number not in self._open:
                thread.shutdown(wait=False)
            self._opening[client] -= 1
            if not self._opening[client]:
                del self._opening[client]
        if not self._store.leases.is_attached(client.client_id):
            del self._open[number]
            await self._close(opened)
            raise RegistrationEnded("the client has disconnected")
        client.on_detach.add(opened.on_detach)
        log.info(
            "GPU memory of a client is open",
            extra={"client": client.name, "gpu": places.bus_id, "allocations": len(places.handles)},
        )
        self._register_arena()
        return number

    async def unregister(self, caller: Caller, number: int) -> None:
        """On return the memory is closed. Raises UnknownClient."""
        client = self._store.leases.client(caller)
        opened = self._open.get(number)
        if opened is not None and opened.client is client:
            del self._open[number]
            client.on_detach.discard(opened.on_detach)
            await self._close(opened)

    def _detached(self, number: int) -> None:
        opened = self._open.pop(number, None)
        if opened is not None:
            opened.registration.end()
            self._tasks.start(self._close(opened), "GPU memory of a client that has disconnected")

    async def _close(self, opened: _Open) -> None:
        """After the thread's running copies. They are few layers, because the registration has ended."""
        opened.registration.end()
        await on_thread(opened.registration.close, opened.thread)
        log.info("GPU memory of a client is closed", extra={"client": opened.client.name})

    def _get(self, caller: Caller, number: int) -> _Open:
        """Raises DeviceUnavailable, UnknownClient, RegistrationEnded: also for another client's registration."""
        self.check_offered()
        opened = self._open.get(number)
        if opened is None or opened.client is not self._store.leases.client(caller):
            raise RegistrationEnded("the client has no such registration of GPU memory: register it again")
        return opened

    # Copies

    async def load(
        self, caller: Caller, number: int, lease_id: int, blocks: Span, order: PageLoad
    ) -> AsyncGenerator[int, None]:
        """Copy leased blocks into pages. Yields how many layers are there; the same number again while bytes arrive.

        Once this has ended, nothing is written any more. Raises DeviceUnavailable, UnknownClient, RegistrationEnded,
        InvalidRequest, NotShared; as `Loads.locate`.
        """
        opened = self._get(caller, number)
        registration, layers = opened.registration, opened.registration.shard.layers
        if self._store.leases.get(caller, lease_id).layout != registration.layout:
            raise InvalidRequest("the lease is of another layout than the registration", field="lease_id")
        steps = self._store.loads.locate(caller, lease_id, registration.shard, blocks, verify=True, path="cuda_ipc")
        run: LoadRun | None = None
        async with aclosing(steps):  # Last: until then the blocks stay in their place.
            try:
                async for step in steps:
                    if isinstance(step, NotInPlace):
                        raise NotShared(step.why)
                    if isinstance(step, Located):
                        run = await self._on(opened.thread, partial(self._load, registration, order, step))
                        continue
                    assert run is not None
                    while run.begun < step:
                        await self._on(opened.thread, partial(run.step, step, _until(self._store.clock, _TURN_S)))
                        yield run.copied
                    if step == layers:
                        break
                    yield run.copied
                while run is not None and run.copied < layers:
                    await self._on(opened.thread, run.wait)
                    yield run.copied
            finally:
                if run is not None:
                    await self._on(opened.thread, run.stop)

    def _load(self, registration: Registration, order: PageLoad, located: Located) -> LoadRun:
        """On the registration's thread: it takes milliseconds for thousands of blocks."""
        return registration.load(order, located.token_counts.tolist(), self._runs(registration, located))

    def _runs(self, registration: Registration, located: Located) -> Callable[[int], Runs]:
        """Where each block's slice of a layer is: one range, or two where the block was stored with more heads."""
        layout, shard = registration.layout, registration.shard
        base, encoded = int(self._arena.memory.ctypes.data), np.ascontiguousarray(located.shards).tobytes()
        size = len(encoded) // len(located.offsets)
        blocks = []
        counts = located.token_counts.tolist()
        for number, (offset, count) in enumerate(zip(located.offsets.tolist(), counts, strict=True)):
            stored = Shard.decode(encoded[number * size : (number + 1) * size])
            slices = block_geometry(layout, stored, count).slices[shard.layer_begin - stored.layer_begin :]
            blocks.append((base + offset, slices))

        def of_layer(layer: int) -> Runs:
            heads = layout.heads_of(shard, shard.layer_begin + layer)
            runs = []
            for address, slices in blocks:
                start, end, _, head_begin, head_end = piece = slices[layer]
                if (head_begin, head_end) == heads:
                    runs.append([(address + start, end - start)])
                else:
                    both = piece.head_runs(*heads)
                    runs.append([(address + start + begin, stop - begin) for begin, stop in both])
            return runs

        return of_layer

    @asynccontextmanager
    async def save(
        self, caller: Caller, number: int, header: SaveHeader, chains: Sequence[ChainOrder]
    ) -> AsyncIterator[SaveRun]:
        """A save of blocks from pages; leaving it without a commit abandons it.

        Raises DeviceUnavailable, UnknownClient, RegistrationEnded, InvalidRequest; as `Saves.fill`.
        """
        opened = self._get(caller, number)
        registration = opened.registration
        if header.fingerprint != registration.layout.fingerprint or header.shard not in (None, registration.shard):
            raise InvalidRequest("the save is of another layout or shard than the registration", field="header")
        if header.shard is None and registration.shard != Shard.whole(registration.layout):
            raise InvalidRequest("the save is of whole blocks, and the registration of a shard", field="header")
        if len(chains) != len(header.chains):
            raise InvalidRequest(f"pages of {len(chains)} chains are given, not {len(header.chains)}", field="chains")
        async with self._store.saves.fill(caller, header, "cuda_ipc") as upload:
            on = partial(self._on, opened.thread)
            run = SaveRun(registration, upload, header, chains, self._arena.memory, self._hashing, on)
            try:
                await run.check()
                yield run
            finally:  # Before the space of the blocks is free.
                await run.stop()

    # CUDA, and its errors

    async def _on(self, thread: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        """What `work` returns. Raises KVErrors only, for whatever CUDA says."""
        try:
            return await on_thread(work, thread)
        except KVError:
            raise
        except ValueError as error:  # Sizes that do not fit, from `kvservice_api.cuda`.
            raise InvalidRequest(str(error)) from error
        except Exception as error:
            if why := self._devices.noted(error):
                self._refuse(why)
            raise DeviceUnavailable(f"the daemon's GPU copy failed: {error}") from error

    def _refuse(self, why: str) -> None:
        if not self.refused_because:
            self.has_failed = True
            self.refused_because = f"an error has ended the use of CUDA until the next start: {why}"
            log.error("cuda_ipc is not offered any more: %s", self.refused_because)

    # The arena

    def _register_arena(self) -> None:
        """Register the arena from the first registration on, in the background: until then it is copied by pinned
        memory.
        """
        if not self._is_arena_registering:
            self._is_arena_registering = True
            self._tasks.start(self._follow_arena(), "registration of the arena with CUDA")

    async def _follow_arena(self) -> None:
        begin, more = 0, True
        thread = ThreadPoolExecutor(1, thread_name_prefix="cuda-arena")
        try:
            while more:
                end = self._arena.ready_bytes()
                for start in range(begin, end, PIECE_BYTES):
                    stop = min(start + PIECE_BYTES, end)
                    await on_thread(partial(self._devices.register, self._arena.memory, start, stop), thread)
                begin, more = end, await self._arena.grown()
        finally:
            thread.shutdown(wait=False)

    async def close(self) -> None:
        """Close everything. No call runs any more. What a GPU that hangs has open is left to the process's end."""
        closing = asyncio.ensure_future(self._close_all())
        try:
            async with self._store.clock.timeout(_CLOSE_S):
                await asyncio.shield(closing)
        except TimeoutError:
            log.error("a GPU has not ended its work within %g s: its memory is not closed", _CLOSE_S)

    async def _close_all(self) -> None:
        await self._tasks.stop()
        while self._open:
            _, opened = self._open.popitem()
            await self._close(opened)
        await on_thread(partial(self._devices.forget, self._arena.memory))


class _Devices:
    """The GPUs that this daemon uses, made when a client names one. Any thread may call it; only `of` waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # While one is made, which takes seconds.
        self._of: dict[str, UsedGpu] = {}

    def of(self, bus_id: str) -> UsedGpu:
        """Raises DeviceUnavailable, InvalidRequest."""
        try:
            gpu = Gpu.of_bus_id(bus_id)
        except ValueError as error:
            raise DeviceUnavailable(str(error)) from error
        if (made := self._of.get(gpu.bus_id)) is not None:
            return made
        with self._lock:
            if gpu.bus_id not in self._of:
                gpu.make_context()
                gpu.use()
                host = next((each.host for each in self._of.values()), None) or HostMemory(gpu)
                self._of[gpu.bus_id] = UsedGpu(gpu, host, PageKernels(gpu))
            return self._of[gpu.bus_id]

    def noted(self, error: Exception) -> str:
        """Why no device can be used any more after this error; "" if they can. Sticky errors end the process's CUDA."""
        devices = list(self._of.values())
        for device in devices:
            device.gpu.note(error)
        return str(error) if any(device.gpu.is_broken for device in devices) else ""

    def register(self, memory: NDArray[np.uint8], begin: int, end: int) -> None:
        for device in list(self._of.values())[:1]:  # One process has one HostMemory.
            device.host.register(memory, begin, end)

    def forget(self, memory: NDArray[np.uint8]) -> None:
        for device in list(self._of.values())[:1]:
            device.host.forget(memory)

    @property
    def registered_bytes(self) -> int:
        return next((device.host.registered_bytes for device in list(self._of.values())), 0)


def _until(clock: Clock, seconds: float) -> Callable[[], bool]:
    """Whether fewer seconds have passed since the first call."""
    ends: list[float] = []

    def more() -> bool:
        now_s = clock.monotonic_s()
        if not ends:
            ends.append(now_s + seconds)
        return now_s < ends[0]

    return more
