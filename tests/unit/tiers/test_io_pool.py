"""The order in which the I/O threads run their jobs, and the effect of cancellation."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from kvservice.tiers.files import WRITE, IoPool


class OneThread:
    """A pool with one thread that is busy until `go`, so that later jobs queue."""

    def __init__(self) -> None:
        self.pool = IoPool(1)
        self.done: list[str] = []
        self._gate = threading.Event()
        self._busy = threading.Event()

    async def start(self) -> None:
        self._first = asyncio.ensure_future(self.pool.run(0.0, self._wait))
        await asyncio.to_thread(self._busy.wait)

    def queue(self, name: str, priority: float, prepare: Callable[[], object] | None = None) -> asyncio.Task[None]:
        return asyncio.ensure_future(self.pool.run(priority, lambda: self.done.append(name), prepare))

    async def go(self, *queued: Awaitable[object]) -> None:
        self._gate.set()
        await self._first
        await asyncio.gather(*queued)

    def _wait(self) -> None:
        self._busy.set()
        assert self._gate.wait(60)


@pytest.fixture
async def thread() -> AsyncIterator[OneThread]:
    busy = OneThread()
    await busy.start()
    yield busy
    busy._gate.set()
    busy.pool.close()


async def queued(tasks: list[asyncio.Task[None]]) -> list[asyncio.Task[None]]:
    await asyncio.sleep(0)  # A task queues its work in its first step.
    return tasks


async def test_reads_go_before_writes_and_urgent_ones_first(thread: OneThread) -> None:
    names = {"write": WRITE, "later": 30.0, "now": 10.0, "soon": 20.0, "soon too": 20.0, "write too": WRITE}
    tasks = await queued([thread.queue(name, priority) for name, priority in names.items()])

    await thread.go(*tasks)

    assert thread.done == ["now", "soon", "soon too", "later", "write", "write too"]


@pytest.mark.parametrize("prepare", [None, lambda: None])
async def test_reads_without_end_do_not_keep_writes_off_the_disk(
    thread: OneThread, prepare: Callable[[], object] | None
) -> None:
    tasks = [thread.queue("write", WRITE, prepare)] + [thread.queue("read", 0.0) for _ in range(100)]

    await thread.go(*await queued(tasks))

    assert thread.done.count("read") == 100
    assert 20 < thread.done.index("write") < 50


async def test_a_write_is_prepared_while_others_have_all_places_of_writes() -> None:
    pool, gate, prepared = IoPool(2), threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    writes = [
        asyncio.ensure_future(pool.run(WRITE, gate.wait)),
        asyncio.ensure_future(pool.run(WRITE, gate.wait, lambda: loop.call_soon_threadsafe(prepared.set))),
    ]
    await asyncio.wait_for(prepared.wait(), 30)
    assert await asyncio.wait_for(pool.run(0.0, lambda: "read"), 30) == "read"
    assert not any(write.done() for write in writes)
    gate.set()
    assert all(await asyncio.gather(*writes))
    await asyncio.to_thread(pool.close)


async def test_a_write_that_cannot_be_prepared_is_not_made(thread: OneThread) -> None:
    def fail() -> None:
        raise ValueError("damaged")

    good, bad = await queued([thread.queue("good", WRITE, lambda: None), thread.queue("bad", WRITE, fail)])
    await thread.go(good)
    with pytest.raises(ValueError, match="damaged"):
        await bad
    assert thread.done == ["good"]


async def test_a_write_that_was_not_prepared_yet_is_called_off_by_cancelling(thread: OneThread) -> None:
    called_off, kept = await queued([thread.queue(name, WRITE, lambda: None) for name in ("called off", "kept")])
    called_off.cancel()
    with pytest.raises(asyncio.CancelledError):
        await called_off
    await thread.go(kept)
    assert thread.done == ["kept"]


@pytest.mark.parametrize("threads", [2, 4, 8])
async def test_however_many_writes_wait_a_read_finds_a_thread(threads: int) -> None:
    pool, gate = IoPool(threads), threading.Event()
    writes = [asyncio.ensure_future(pool.run(WRITE, gate.wait)) for _ in range(3 * threads)]

    assert await asyncio.wait_for(pool.run(0.0, lambda: "read"), 30) == "read"
    assert not any(write.done() for write in writes)

    gate.set()
    assert all(await asyncio.gather(*writes))
    await asyncio.to_thread(pool.close)


async def test_work_that_did_not_begin_is_called_off_by_cancelling(thread: OneThread) -> None:
    called_off, kept = await queued([thread.queue("called off", 0.0), thread.queue("kept", 0.0)])

    called_off.cancel()
    with pytest.raises(asyncio.CancelledError):
        await called_off
    await thread.go(kept)

    assert thread.done == ["kept"]


async def test_the_outcome_of_a_cancelled_call_disturbs_no_other_call_and_is_no_error_of_the_event_loop() -> None:
    unseen: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unseen.append(context))
    pool = IoPool(2)
    begun, go_on = threading.Event(), threading.Event()

    def fail() -> None:
        begun.set()
        assert go_on.wait(60)
        raise LookupError("too late to matter")

    task = asyncio.ensure_future(pool.run(0.0, fail))
    await asyncio.to_thread(begun.wait)
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await pool.run(0.0, lambda: "next") == "next"
    pool.close()
    del task
    gc.collect()
    assert unseen == []


async def test_closing_finishes_what_is_queued(thread: OneThread) -> None:
    tasks = await queued([thread.queue("read", 0.0), thread.queue("write", WRITE)])
    closing = asyncio.ensure_future(asyncio.to_thread(thread.pool.close))

    await thread.go(*tasks, closing)

    assert thread.done == ["read", "write"]


def test_a_loop_that_was_closed_meanwhile_harms_no_thread() -> None:
    pool = IoPool(1)
    go_on = threading.Event()
    done: list[bool] = []
    loop = asyncio.new_event_loop()
    task = loop.create_task(pool.run(0.0, lambda: done.append(go_on.wait(60))))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()

    go_on.set()
    pool.close()

    assert done == [True]
    assert not task.done()
