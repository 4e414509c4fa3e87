"""The daemon's knowledge of the file systems of its files."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from kvservice.tiers.files import file_system_of, on_thread


@pytest.mark.parametrize(("path", "kind"), [("/dev/shm", "tmpfs"), ("/proc", "proc")])
def test_the_kind_of_a_file_system_is_the_kernels_word_for_it(path: str, kind: str) -> None:
    assert file_system_of(Path(path)) == kind


async def test_an_error_of_work_whose_caller_was_cancelled_is_no_error_of_the_event_loop() -> None:
    unseen: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unseen.append(context))
    has_begun, may_go_on = threading.Event(), threading.Event()

    def work() -> None:
        has_begun.set()
        may_go_on.wait()
        raise OSError("the client has gone")

    caller = asyncio.create_task(on_thread(work))
    await on_thread(has_begun.wait)
    caller.cancel()
    await asyncio.sleep(0)
    may_go_on.set()

    with pytest.raises(asyncio.CancelledError):
        await caller
    del caller
    await asyncio.sleep(0)

    assert unseen == []
