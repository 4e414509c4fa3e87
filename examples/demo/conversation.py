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
    OTHERS_SPEAK_AFTER,
    READERS,
    SYSTEM,
    TURNS,
    Message,
    assistant,
    user,
)

_MIB = 2**20
_SHARED_MEMORY = Path("/dev/shm")
# What a cut has left cannot be computed from its tokens alone as it was: an engine that did so, because the daemon is
# slow or computing is fast, might answer otherwise. It is to be seen that what is loaded gives the same answer.
_PATIENCE_S = 10.0


def hold_conversation(model: str, note: Callable[[str], None]) -> Iterator[Turn]:
    """Each turn of the script, as soon as it is answered. `note` hears what happens in between."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvservice-demo-")))
        address = DaemonProcess.address_in(folder)
        note("The engine loads the model.")
        engine = stack.enter_context(EngineProcess(address, model))
        loaded = engine.loaded()
        dram_bytes, ssd_bytes = _tier_sizes(engine, loaded)
        dram_folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix=f"kvservice-demo-{os.getpid()}-", dir=_dram_place(dram_bytes))
        )

        def start_daemon() -> DaemonProcess:
            return stack.enter_context(DaemonProcess(folder, Path(dram_folder), dram_bytes, ssd_bytes))

        daemon = start_daemon()
        note(f"{loaded.model_id}; DRAM tier {dram_bytes // _MIB} MiB, SSD tier {ssd_bytes // _MIB} MiB.")
        conversation: list[Message] = [{"role": "system", "content": SYSTEM}]
        others = [reader.opening() for reader in READERS]
        rounds = iter(zip(*(reader.questions for reader in READERS), strict=True))
        for number, text in enumerate(TURNS, start=1):
            yield _said(engine, "conversation", conversation, text, compare=True)
            if number in OTHERS_SPEAK_AFTER:
                note(
                    "Other readers ask about the whole book; what the daemon brings up for them pushes this out to SSD."
                )
                for reader, (other, question) in enumerate(zip(others, next(rounds), strict=True)):
                    _said(engine, f"reader-{reader}", other, question, compare=False)
            if number == KILL_AFTER:
                note("SIGKILL for the daemon and the engine. Both start again as new processes.")
                daemon.kill()
                engine.kill()
                daemon = start_daemon()
                engine = stack.enter_context(EngineProcess(address, model))
                engine.loaded()


def hold_overflowing_conversation(model: str, window: int, note: Callable[[str], None]) -> Iterator[Turn]:
    """The same conversation in a window that it overflows. A second engine, which is not killed, keeps it in memory."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvservice-demo-")))
        address = DaemonProcess.address_in(folder)
        note("Two engines load the model: one with the daemon, and one that keeps the history in its memory.")
        engine, in_memory = (stack.enter_context(EngineProcess(address, model, _PATIENCE_S)) for _ in range(2))
        loaded = engine.loaded()
        in_memory.loaded()
        size_bytes = _enough_for(engine, loaded, window)
        dram_folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix=f"kvservice-demo-{os.getpid()}-", dir=_dram_place(size_bytes))
        )

        def start_daemon() -> DaemonProcess:
            return stack.enter_context(DaemonProcess(folder, Path(dram_folder), size_bytes, size_bytes))

        daemon = start_daemon()
        note(f"{loaded.model_id}; a window of {window} tokens; 4 of them, and the latest, stay when it overflows.")
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
                note("SIGKILL for the daemon and its engine. Both start again as new processes.")
                daemon.kill()
                engine.kill()
                daemon = start_daemon()
                engine = stack.enter_context(EngineProcess(address, model, _PATIENCE_S))
                engine.loaded()


def _enough_for(engine: EngineProcess, loaded: Loaded, window: int) -> int:
    """Bytes of a tier that holds the whole script. Raises ProcessFailed where the window is too small, or too large."""
    first, *others = engine.count_tokens([[{"role": "system", "content": SYSTEM}, user(text)] for text in TURNS])
    longest, total = max(first, *others), sum((first, *others)) + ANSWER_TOKENS_MAX * len(TURNS)
    if window < 2 * (longest + ANSWER_TOKENS_MAX):
        raise ProcessFailed(f"a window of {window} tokens is too small for turns of {longest} tokens; take twice that")
    if 0 < loaded.context_tokens < window:
        raise ProcessFailed(f"{loaded.model_id} takes {loaded.context_tokens} tokens; the window has {window}")
    return int(1.2 * math.ceil(total / BLOCK_TOKENS + len(TURNS)) * loaded.block_bytes) + 16 * _MIB


def _said(engine: EngineProcess, session_id: str, conversation: list[Message], text: str, *, compare: bool) -> Turn:
    conversation.append(user(text))
    turn = engine.answer(conversation, session_id=session_id, compare=compare)
    conversation.append(assistant(turn.answer))
    return turn


def _tier_sizes(engine: EngineProcess, loaded: Loaded) -> tuple[int, int]:
    """DRAM for this conversation but not for the others' besides; SSD for all of them."""
    scripts = [[{"role": "system", "content": SYSTEM}, *_exchange(TURNS)]]
    scripts += [[*reader.opening(), *_exchange(reader.questions)] for reader in READERS]
    counts = engine.count_tokens(scripts)
    tokens = [count + ANSWER_TOKENS_MAX * len(script) // 2 for count, script in zip(counts, scripts, strict=True)]
    if 0 < loaded.context_tokens < max(tokens):
        raise ProcessFailed(f"{loaded.model_id} takes {loaded.context_tokens} tokens; the demo needs {max(tokens)}")
    sizes = [math.ceil(count / BLOCK_TOKENS) * loaded.block_bytes for count in tokens]
    # What the tiers keep free, what extents are rounded up by, and the index: a fifth, and some MiB.
    return int(1.2 * sizes[0]) + 8 * _MIB, int(1.2 * sum(sizes)) + 16 * _MIB


def _exchange(questions: Sequence[str]) -> list[Message]:
    return [message for question in questions for message in (user(question), assistant(""))]


def _dram_place(size_bytes: int) -> Path | None:
    """Shared memory, unless there is too little of it, as in many containers; then the temporary directory."""
    has_room = _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > size_bytes + 16 * _MIB
    return _SHARED_MEMORY if has_room else None
