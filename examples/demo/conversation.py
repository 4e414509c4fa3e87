"""Runs the script: a conversation, other readers in between, and SIGKILL for daemon and engine halfway."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from examples.demo.engine_process import EngineProcess
from examples.demo.report import Turn
from examples.demo.script import (
    ANSWER_TOKENS_MAX,
    BLOCK_TOKENS,
    KILL_AFTER,
    READERS,
    READERS_ASK_AFTER,
    TURNS,
    Message,
    assistant,
    opening,
    user,
)
from examples.local_daemon import LocalDaemon
from kvservice_adapter.session import Conversation

_MIB = 2**20
_SHARED_MEMORY = Path("/dev/shm")
# KV that remains after a cut cannot be recomputed exactly from its tokens: an engine that recomputes it may answer
# differently. So with a window the engine waits long enough for the daemon, and always loads.
_DAEMON_WAIT_S = 10.0


def hold_conversation(
    model: str, log: Callable[[str], None], window: int | None = None, *, always_load: bool = False
) -> Iterator[Turn]:
    """Yields each turn of the script when it is answered. `log` is called with a line per event between turns.

    With a `window`, in tokens, the conversation overflows it, there are no other readers, and answers are compared to
    those of a second engine, which is not killed and keeps the conversation in its memory. `always_load`: also where
    computing is faster, as for a tiny model.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvservice-demo-")))

        def start_engine() -> EngineProcess:
            wait_s = _DAEMON_WAIT_S if window or always_load else None
            return stack.enter_context(EngineProcess(str(folder / "kvservice.sock"), model, wait_s))

        log("Two engines load the model: one with the daemon, and one that keeps the history in its memory."
            if window else "The engine loads the model.")  # fmt: skip
        engine = start_engine()
        other_engine = start_engine() if window else engine
        model_id, block_bytes, context_tokens = engine.call("warm_up")
        if window:
            other_engine.call("warm_up")
            dram_bytes = ssd_bytes = _bytes_for_window(engine, block_bytes, window)
        else:
            dram_bytes, ssd_bytes, needed_tokens = _tier_sizes(engine, block_bytes)
        if 0 < context_tokens < (window or needed_tokens):
            raise SystemExit(f"{model_id} takes {context_tokens} tokens; the demo needs {window or needed_tokens}")
        dram_folder = tempfile.TemporaryDirectory(prefix=f"kvservice-demo-{os.getpid()}-", dir=_dram_place(dram_bytes))
        start_daemon = partial(
            LocalDaemon,
            folder,
            dram_folder=Path(stack.enter_context(dram_folder)),
            dram_bytes=dram_bytes,
            ssd_bytes=ssd_bytes,
        )
        daemon = stack.enter_context(start_daemon())
        log(
            f"{model_id}; a window of {window} tokens; its first 4 and its latest tokens stay when it overflows."
            if window
            else f"{model_id}; DRAM tier {dram_bytes // _MIB} MiB, SSD tier {ssd_bytes // _MIB} MiB."
        )
        conversation = opening()
        state: tuple[Conversation, list[int]] = Conversation("conversation"), []
        others = [reader.opening() for reader in READERS]
        for number, text in enumerate(TURNS, start=1):
            conversation.append(user(text))
            if window:
                expected = other_engine.call("answer_in_memory", conversation, window)
                turn, state = engine.call("answer_in_window", conversation, window, state)
            else:
                expected = engine.call("recompute", conversation)
                turn = engine.call("answer", conversation, "conversation")
            conversation.append(assistant(turn.answer))
            yield replace(turn, identical=turn.answer_ids == expected[0], ttft_recompute_s=expected[1])
            if not window and number in READERS_ASK_AFTER:
                log("Other readers ask about the whole book; the daemon promotes their blocks and evicts these to SSD.")
                for at, (reader, other) in enumerate(zip(READERS, others, strict=True)):
                    other.append(user(reader.questions[READERS_ASK_AFTER.index(number)]))
                    other.append(assistant(engine.call("answer", other, f"reader-{at}").answer))
            if number == KILL_AFTER:
                log("SIGKILL for the daemon and its engine. Both start again as new processes.")
                daemon.kill()
                engine.kill()
                daemon = stack.enter_context(start_daemon())
                engine = start_engine()
                engine.call("warm_up")


def _bytes_for_window(engine: EngineProcess, block_bytes: int, window: int) -> int:
    """Bytes of a tier that holds the whole script."""
    counts = [engine.call("count_tokens", [*opening(), user(text)]) for text in TURNS]
    if window < 2 * (max(counts) + ANSWER_TOKENS_MAX):
        raise SystemExit(f"a window of {window} tokens is too small for turns of {max(counts)} tokens; take twice that")
    blocks = math.ceil((sum(counts) + ANSWER_TOKENS_MAX * len(TURNS)) / BLOCK_TOKENS) + len(TURNS)
    return int(1.2 * blocks * block_bytes) + 16 * _MIB


def _tier_sizes(engine: EngineProcess, block_bytes: int) -> tuple[int, int, int]:
    """Bytes of DRAM for this conversation only, of SSD for all conversations, and the tokens of the longest one."""
    tokens = [
        engine.call("count_tokens", [*start, *_exchange(questions)]) + ANSWER_TOKENS_MAX * len(questions)
        for start, questions in ((opening(), TURNS), *((reader.opening(), reader.questions) for reader in READERS))
    ]
    sizes = [math.ceil(count / BLOCK_TOKENS) * block_bytes for count in tokens]
    # Free space of the tiers, rounding of extents, and the index take a fifth and some MiB.
    return int(1.2 * sizes[0]) + 8 * _MIB, int(1.2 * sum(sizes)) + 16 * _MIB, max(tokens)


def _exchange(questions: Sequence[str]) -> list[Message]:
    return [message for question in questions for message in (user(question), assistant(""))]


def _dram_place(size_bytes: int) -> Path | None:
    """/dev/shm, or None for the temporary directory if /dev/shm is too small, as in many containers."""
    has_room = _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > size_bytes + 16 * _MIB
    return _SHARED_MEMORY if has_room else None
