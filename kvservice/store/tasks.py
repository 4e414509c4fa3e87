"""Work on the event loop: background tasks that are kept alive and named, and turns that are kept short."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from kvservice.tiers.files import ended
from kvservice_api.errors import KVError

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)

_PART = 16  # Evictions of so many blocks take most of a millisecond of the event loop.
_PARTS_AT_ONCE = 16  # Their commits of the index are shared.
_AT_ONCE = 2


async def all_of(work: Iterable[Awaitable[T]]) -> list[T]:
    """The results of all of them. If one fails, or the caller is cancelled, the others are cancelled.

    Returns or raises once all have ended, unlike `asyncio.gather`: on return the caller may free what they use.
    """
    running = [asyncio.ensure_future(each) for each in work]
    try:
        if running:
            await asyncio.wait(running, return_when=asyncio.FIRST_EXCEPTION)
        failed = next((each for each in running if each.done() and not each.cancelled() and each.exception()), None)
        if failed is None:
            return [await each for each in running]
        return [await failed]  # Raises.
    finally:
        await cancel(running)


async def cancel(running: Collection[asyncio.Future[Any]]) -> None:
    """Cancel those that still run. Returns once all have ended."""
    for each in running:
        each.cancel()
    for each in running:
        await ended(each)
        if not each.cancelled():
            each.exception()  # Another error was raised before it.


class Tasks:
    """Running background work. `stop` cancels tasks that never end by themselves."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def start_quietly(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """The same for work whose failure its waiters handle; without waiters, an expected failure is ignored."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._ended_quietly)
        return task

    async def stop(self) -> None:
        while tasks := list(self._running):  # The end of a task may start another.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0)  # Their callbacks remove them from the list.

    def _ended_quietly(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and isinstance(task.exception(), KVError):
            self._running.discard(task)
        else:
            self._ended(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background work failed: %s", task.get_name(), exc_info=error)


class LoopBudget:
    """Lets a few pieces of work, of a millisecond at most, into each turn of the event loop; the others queue.

    Work in large numbers, such as the frames of all loads, awaits a slot before each piece.
    """

    def __init__(self, at_once: int = _AT_ONCE) -> None:
        self._places = asyncio.Semaphore(at_once)

    async def slot(self) -> None:
        """Returns when the caller has a slot, which ends when the caller awaits."""
        await self._places.acquire()
        asyncio.get_running_loop().call_soon(self._places.release)


async def in_parts(items: Sequence[T], work: Callable[[Sequence[T]], Awaitable[R]], loop_budget: LoopBudget) -> list[R]:
    """Returns the results of `work` for consecutive parts of `items`, so that no turn of the event loop is long. Each
    part begins in a turn of its own, and several parts wait for I/O at the same time. Few items are one part, which
    begins in this turn. If `work` fails for a part, the parts that have not begun are left out, as by `all_of`.
    """
    if len(items) <= _PART:
        return [await work(items)] if items else []

    async def one(part: Sequence[T]) -> R:
        await loop_budget.slot()
        return await work(part)

    results: list[R] = []
    for start in range(0, len(items), _PARTS_AT_ONCE * _PART):
        end = min(start + _PARTS_AT_ONCE * _PART, len(items))
        results += await all_of(one(items[at : min(at + _PART, end)]) for at in range(start, end, _PART))
    return results
