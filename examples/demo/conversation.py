"""Runs the script: a conversation, other readers in between, and SIGKILL for daemon and engine halfway."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from examples.demo.processes import DaemonProcess, EngineProcess, ProcessFailed
from examples.demo.protocol import ANSWER_TOKENS_MAX, BLOCK_TOKENS, Loaded, Turn
from examples.demo.script import (
    KILL_AFTER,
    READERS,
    READERS_ASK_AFTER,
    SYSTEM,
    TURNS,
    Message,
    assistant,
    user,
)

_MIB = 2**20
_SHARED_MEMORY = Path("/dev/shm")
# KV that remains after a cut cannot be recomputed exactly from its tokens: an engine that recomputes it may answer
# differently. So this engine waits long enough for the daemon, and always loads.
_DAEMON_WAIT_S = 10.0


def hold_conversation(model: str, log: Callable[[str], None]) -> Iterator[Turn]:
    """Yields each turn of the script when it is answered. `log` is called with a line per event between turns."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvservice-demo-")))
        address = DaemonProcess.address_in(folder)
        log("The engine loads the model.")
        engine = stack.enter_context(EngineProcess(address, model))
        loaded = engine.loaded()
        dram_bytes, ssd_bytes = _tier_sizes(engine, loaded)
        dram_folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix=f"kvservice-demo-{os.getpid()}-", dir=_dram_place(dram_bytes))
        )

        def start_daemon() -> DaemonProcess:
            return stack.enter_context(DaemonProcess(folder, Path(dram_folder), dram_bytes, ssd_bytes))

        daemon = start_daemon()
        log(f"{loaded.model_id}; DRAM tier {dram_bytes // _MIB} MiB, SSD tier {ssd_bytes // _MIB} MiB.")
        conversation: list[Message] = [{"role": "system", "content": SYSTEM}]
        others = [reader.opening() for reader in READERS]
        rounds = iter(zip(*(reader.questions for reader in READERS), strict=True))
        for number, text in enumerate(TURNS, start=1):
            yield _answer(engine, "conversation", conversation, text, compare=True)
            if number in READERS_ASK_AFTER:
                log("Other readers ask about the whole book; the daemon promotes their blocks and evicts these to SSD.")
                for reader, (other, question) in enumerate(zip(others, next(rounds), strict=True)):
                    _answer(engine, f"reader-{reader}", other, question, compare=False)
            if number == KILL_AFTER:
                log("SIGKILL for the daemon and the engine. Both start again as new processes.")
                daemon.kill()
                engine.kill()
                daemon = start_daemon()
                engine = stack.enter_context(EngineProcess(address, model))
                engine.loaded()


def hold_overflowing_conversation(model: str, window: int, log: Callable[[str], None]) -> Iterator[Turn]:
    """The same conversation in a window that it overflows. A second engine, which is not killed, keeps it in memory."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvservice-demo-")))
        address = DaemonProcess.address_in(folder)
        log("Two engines load the model: one with the daemon, and one that keeps the history in its memory.")
        engine, in_memory = (stack.enter_context(EngineProcess(address, model, _DAEMON_WAIT_S)) for _ in range(2))
        loaded = engine.loaded()
        in_memory.loaded()
        size_bytes = _bytes_for_window(engine, loaded, window)
        dram_folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix=f"kvservice-demo-{os.getpid()}-", dir=_dram_place(size_bytes))
        )

        def start_daemon() -> DaemonProcess:
            return stack.enter_context(DaemonProcess(folder, Path(dram_folder), size_bytes, size_bytes))

        daemon = start_daemon()
        log(
            f"{loaded.model_id}; a window of {window} tokens; its first 4 and its latest tokens stay when it overflows."
        )
        conversation: list[Message] = [{"role": "system", "content": SYSTEM}]
        state = ""
        for number, text in enumerate(TURNS, start=1):
            conversation.append(user(text))
            expected = in_memory.answer_in_memory(conversation, window=window)
            answered = engine.answer_in_window(conversation, session_id="conversation", window=window, state=state)
            conversation.append(assistant(answered.turn.answer))
            state = answered.state
            yield replace(
                answered.turn,
                ttft_recompute_s=expected.ttft_recompute_s,
                identical=answered.answer_ids == expected.answer_ids,
            )
            if number == KILL_AFTER:
                log("SIGKILL for the daemon and its engine. Both start again as new processes.")
                daemon.kill()
                engine.kill()
                daemon = start_daemon()
                engine = stack.enter_context(EngineProcess(address, model, _DAEMON_WAIT_S))
                engine.loaded()


def _bytes_for_window(engine: EngineProcess, loaded: Loaded, window: int) -> int:
    """Bytes of a tier that holds the whole script. Raises ProcessFailed if the window is too small or too large."""
    first, *others = engine.count_tokens([[{"role": "system", "content": SYSTEM}, user(text)] for text in TURNS])
    longest, total = max(first, *others), sum((first, *others)) + ANSWER_TOKENS_MAX * len(TURNS)
    if window < 2 * (longest + ANSWER_TOKENS_MAX):
        raise ProcessFailed(f"a window of {window} tokens is too small for turns of {longest} tokens; take twice that")
    if 0 < loaded.context_tokens < window:
        raise ProcessFailed(f"{loaded.model_id} takes {loaded.context_tokens} tokens; the window has {window}")
    return int(1.2 * math.ceil(total / BLOCK_TOKENS + len(TURNS)) * loaded.block_bytes) + 16 * _MIB


def _answer(engine: EngineProcess, session_id: str, conversation: list[Message], text: str, *, compare: bool) -> Turn:
    conversation.append(user(text))
    turn = engine.answer(conversation, session_id=session_id, compare=compare)
    conversation.append(assistant(turn.answer))
    return turn


def _tier_sizes(engine: EngineProcess, loaded: Loaded) -> tuple[int, int]:
    """Bytes of DRAM for this conversation only, and of SSD for all conversations."""
    scripts = [[{"role": "system", "content": SYSTEM}, *_exchange(TURNS)]]
    scripts += [[*reader.opening(), *_exchange(reader.questions)] for reader in READERS]
    counts = engine.count_tokens(scripts)
    tokens = [count + ANSWER_TOKENS_MAX * len(script) // 2 for count, script in zip(counts, scripts, strict=True)]
    if 0 < loaded.context_tokens < max(tokens):
        raise ProcessFailed(f"{loaded.model_id} takes {loaded.context_tokens} tokens; the demo needs {max(tokens)}")
    sizes = [math.ceil(count / BLOCK_TOKENS) * loaded.block_bytes for count in tokens]
    # Free space of the tiers, rounding of extents, and the index take a fifth and some MiB.
    return int(1.2 * sizes[0]) + 8 * _MIB, int(1.2 * sum(sizes)) + 16 * _MIB


def _exchange(questions: Sequence[str]) -> list[Message]:
    return [message for question in questions for message in (user(question), assistant(""))]


def _dram_place(size_bytes: int) -> Path | None:
    """/dev/shm, or None for the temporary directory if /dev/shm is too small, as in many containers."""
    has_room = _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > size_bytes + 16 * _MIB
    return _SHARED_MEMORY if has_room else None
