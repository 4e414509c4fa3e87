"""The composition root: puts a daemon together from the opened store and the listeners, serves, and stops."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from contextlib import ExitStack

import numpy as np
from prometheus_client import CollectorRegistry

from kvservice import __version__, process
from kvservice.bulk.port import BulkPort
from kvservice.clock import Clock, SystemClock
from kvservice.config import Settings
from kvservice.device.cuda_ipc import ArenaMemory, CudaIpc, why_cuda_is_off
from kvservice.metrics.heartbeat import Heartbeat
from kvservice.metrics.rows import Sources
from kvservice.metrics.server import MetricsServer, health
from kvservice.rpc.addresses import SocketLock, listen_for_bulk
from kvservice.rpc.admin import AdminService
from kvservice.rpc.blocks import BlockService
from kvservice.rpc.bulk_calls import BulkCalls
from kvservice.rpc.devices import DeviceService
from kvservice.rpc.hints import HintService
from kvservice.rpc.server import Server, UnixSocket
from kvservice.rpc.sessions import SessionService
from kvservice.rpc.tls import Certificates
from kvservice.service_manager import ServiceManager
from kvservice.start_checks import check_start
from kvservice.store.tasks import Tasks
from kvservice.store_opening import StoreParts, open_store
from kvservice.tiers.files import FileCalls
from kvservice.tracing import Tracing
from kvservice_api.malloc import keep_large_buffers, return_free_memory

log = logging.getLogger(__name__)

# New objects until the garbage collector looks at the youngest ones, and its rounds until it looks at older ones. By
# default it looks at all objects each time that 64 clients come, for 15 to 35 ms of the event loop; these few cycles
# wait longer, and the youngest ones take about a millisecond.
_COLLECT_AFTER = (5_000, 10, 100)

_KEPT_FREE_BYTES = 512 << 20
_BULK_THREADS_MAX = 4  # More would not help: each moves GB/s.

_SOCKET_MODES = {"user": 0o600, "group": 0o660, "all": 0o666}


class Daemon:
    """One running daemon. ``await Daemon.open(settings)``, `serve`, and `close` in the end."""

    def __init__(
        self,
        settings: Settings,
        parts: StoreParts,
        resources: ExitStack,
        certificates: Certificates | None,
        clock: Clock,
    ) -> None:
        """Use `open`."""
        self._clock = clock
        self.settings = settings
        self._certificates = certificates
        self.store, self.counters, self.directory, self._executor, dram = parts
        self.cuda_ipc = CudaIpc(
            self.store,
            ArenaMemory(np.frombuffer(dram.arena.data, np.uint8), lambda: dram.arena.ready_bytes, dram.grown),
            self._executor,
            refused_because=why_cuda_is_off(settings.cuda.enabled),
            staging_bytes=int(settings.cuda.staging_bytes),
            registrations_max=settings.cuda.registrations_max,
        )
        self._tasks = Tasks()
        self._resources = resources
        self.boot_epoch = self.store.boot_epoch
        self.registry = CollectorRegistry()
        self.heartbeat = Heartbeat(clock)
        server = settings.server
        path = settings.unix_socket_path
        if path is not None:
            resources.callback(SocketLock(path).release)  # Removed last: until then the socket belongs to this daemon.
        self.bulk = BulkPort(
            self.store,
            clock,
            (lambda: certificates.latest.context) if certificates else None,
            connections_max=server.bulk_connections_max,
            idle_s=server.transfer_idle_s,
            threads=min(_BULK_THREADS_MAX, len(os.sched_getaffinity(0))),
        )
        block_service = BlockService(
            self.store,
            version=__version__,
            residency_directory=lambda: self.directory.path,
            cuda_ipc_refused_because=lambda: self.cuda_ipc.refused_because,
            bulk=self.bulk,
        )
        self._server = Server(
            block_service,
            SessionService(self.store),
            HintService(self.store),
            DeviceService(self.store, self.cuda_ipc),
            AdminService(self.store, self.cuda_ipc, version=__version__, counters=self._counters),
            [server.address],
            frame_bytes=int(server.frame_bytes),
            unix_socket=UnixSocket(path, _SOCKET_MODES[server.unix_socket_access]) if path is not None else None,
            credentials=certificates.server_credentials() if certificates else None,
            is_traced=settings.tracing.enabled,
        )
        self.bulk.answer_calls(BulkCalls(block_service, self._server.calls, self._server.loop_budget).answer)
        self.port = self._server.ports[0]
        self._metrics: MetricsServer | None = None
        if server.metrics_address:
            self._metrics = MetricsServer(
                server.metrics_address,
                self.registry,
                self._sources,
                lambda: health(self.heartbeat, self.store.drain.state_name),
                certificates,
            )
        self.metrics_port = self._metrics.port if self._metrics else 0
        listener = listen_for_bulk(server.bulk_address, server.address, self.port)  # Last: it may do without.
        if listener is not None:
            self.bulk.listen(listener)

    @classmethod
    async def open(cls, settings: Settings, *, clock: Clock | None = None, files: FileCalls | None = None) -> Daemon:
        """Open or create the store and put the daemon together.

        Raises ConfigError, NotThere, HostLimit, StoreError, StoreMismatch, AddressUnusable, OSError.
        """
        check_start(settings)
        certificates = Certificates(settings.tls) if settings.tls.certificate else None
        with ExitStack() as opening:
            if settings.tracing.enabled:
                opening.callback(Tracing(__version__).close)
            files, clock = files or FileCalls(), clock or SystemClock()
            parts = await open_store(settings, clock, files, opening)
            daemon = cls(settings, parts, opening, certificates, clock)
            daemon._resources = opening.pop_all()
            return daemon

    async def serve(self) -> None:
        """Start the background tasks, and then the servers."""
        self.store.start()
        self.bulk.start()
        await self._server.start()
        # Objects of the start are never freed, so the garbage collector can skip them.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_COLLECT_AFTER)
        return_free_memory()  # Reading a million records takes a quarter of a gigabyte, which is then unused.
        self._tasks.start(self.heartbeat.run(), "heartbeat")
        if self._certificates is not None:
            self._tasks.start(self._certificates.watch(self.counters, self._clock), "TLS files")
        self._tasks.start(self.directory.keep(), "residency directory")
        facts, server = self.store.status.facts(), self.settings.server
        ports = {"port": self.port, "bulk_port": self.bulk.port, "metrics_port": self.metrics_port}
        known = {
            "version": __version__,
            "store": str(self.settings.store.path.absolute()),
            "address": server.address,
            "unix_socket": str(self.settings.unix_socket_path or ""),
            "tls": self._certificates is not None,
            "policy": self.settings.mover.policy,
            "tiers": {tier.name: tier.configured_bytes for tier in facts.tiers},
        }
        log.info("serving", extra={**ports, "blocks": facts.blocks, "pid": os.getpid(), **known})

    async def drain(self) -> None:
        """Refuse new saves, wait for running loads and saves, and write what only DRAM has, if that is set.

        Returns when all of it has ended or its time is over.
        """
        self.store.begin_stop()
        await self._server.refuse_new_work()
        timeout_s = self.settings.server.drain_timeout_s
        log.info("draining: running loads and saves may take %g s", timeout_s, extra={"timeout_s": timeout_s})
        try:
            async with self._clock.timeout(timeout_s):
                await self.store.drain.quiet()
        except TimeoutError:
            log.warning("the drain timeout is over; running loads and saves are cancelled")
        write_s = self.settings.server.write_timeout_s
        if not write_s:
            return
        log.info("writing the blocks that only DRAM has: this may take %g s", write_s, extra={"timeout_s": write_s})
        try:
            async with self._clock.timeout(write_s):
                if left := await self.store.drain.written():
                    log.warning("%d blocks are only in DRAM: SSD has no space for them", left, extra={"blocks": left})
        except TimeoutError:
            log.warning("the time is over: some blocks are only in DRAM; raise server.write_timeout_s")

    async def close(self) -> None:
        """Stop the servers, write pending records, and close all files."""
        await self._server.stop(0.5)
        await self.bulk.close()
        await self.cuda_ipc.close()
        await self.store.stop()
        await self._tasks.stop()
        if self._metrics is not None:
            self._metrics.close()
        self._executor.shutdown()
        self._resources.close()
        log.info("stopped")

    def _sources(self) -> Sources:
        """What the metrics read, on their threads."""
        facts, gauges = self.store.status.facts(), self.store.gauges.read()
        return Sources(
            __version__,
            self.counters,
            facts,
            gauges,
            self._server.calls,
            self.heartbeat,
            self._certificates,
            self.cuda_ipc,
            self.bulk,
        )

    def _counters(self) -> dict[str, float]:
        return {
            **self.counters.as_dict(),
            "event_loop_delay_ms_max": self.heartbeat.latest_ms,
            "event_loop_delay_ms_recent": self.heartbeat.recent_ms,
        }


async def run(settings: Settings) -> None:
    """A daemon's whole life: open, serve until SIGTERM or SIGINT, drain, close. The service manager learns of each."""
    tune_process()
    manager, tasks = ServiceManager(SystemClock()), Tasks()
    daemon = await Daemon.open(settings)
    stop, server = asyncio.Event(), settings.server

    def begin_stop() -> None:
        if not stop.is_set():
            stop.set()  # First: a bound that cannot be set prevents no stop.
            process.end_within(server.drain_timeout_s + server.write_timeout_s + process.CLOSE_TIMEOUT_S)

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, begin_stop)
    try:
        await daemon.serve()
        await manager.notify("READY=1", "STATUS=serving")
        tasks.start(manager.keep_watchdog(), "watchdog")
        await stop.wait()
        await manager.notify("STOPPING=1", "STATUS=draining: running loads and saves end")
        await daemon.drain()
    finally:
        await daemon.close()
        await tasks.stop()


def tune_process() -> None:
    """Set the process-wide options of a daemon: for memory and for threads."""
    # I/O threads and committers take the GIL for microseconds, often: 5 ms is too long to wait for it.
    sys.setswitchinterval(0.0005)
    keep_large_buffers(_KEPT_FREE_BYTES)  # A fresh page costs more than its copy.
