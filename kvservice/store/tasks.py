"""Background tasks that are kept alive, named, and never fail unseen."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Coroutine, Iterable
from typing import Any, TypeVar

from kvservice.tiers.io_pool import ended
from kvservice_api.errors import KVError

T = TypeVar("T")

log = logging.getLogger(__name__)


async def all_of(work: Iterable[Awaitable[T]]) -> list[T]:
    """The results of all of them. If one fails, or the caller is cancelled, the others are cancelled.

    Unlike `asyncio.gather`, it returns or raises only when no task runs any more, so the caller may then free what the
    tasks used.
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
