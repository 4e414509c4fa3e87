"""Saves of traced requests from an engine's pages: as many calls as without traces, and spans that all end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import opentelemetry.trace
import pytest
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider

from kvservice_adapter.device.cpu import CpuDevice, CpuStream
from kvservice_adapter.engine.page_saves import PageSave, PageSaver
from kvservice_api import spans
from kvservice_client import BlockChain, block_chain
from kvservice_client.retry import SYSTEM_CLOCK
from tests.daemon import MIB, SOON_S, DaemonProcess, until
from tests.integration.test_engine_pages import LAYOUT, Engine

REQUESTS = 256
IN_ONE_CALL = 32


class Recorder(SpanProcessor):
    """The spans of saves that have begun and ended in this process."""

    def __init__(self) -> None:
        self.begun = 0
        self.ended: list[ReadableSpan] = []

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        self.begun += 1

    def on_end(self, span: ReadableSpan) -> None:
        self.ended.append(span)

    def attributes(self, name: str) -> list[Any]:
        return [(each.attributes or {}).get(f"kvservice.{name}") for each in self.ended]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    provider, made = TracerProvider(shutdown_on_exit=False), Recorder()
    provider.add_span_processor(made)
    monkeypatch.setattr(opentelemetry.trace, "get_tracer", provider.get_tracer)
    return made


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with DaemonProcess(tmp_path) as daemon, daemon.client(transport="shm") as client:
        yield Engine(client.open_layout(LAYOUT), list(range(1, 200)))


@pytest.fixture
def saver(engine: Engine) -> Iterator[PageSaver]:
    made = engine.saver()
    yield made
    made.close(SOON_S)


def of_request(number: int, engine: Engine, *, blocks: int = 1, is_traced: bool = True) -> PageSave:
    tokens = range(number * 1000, number * 1000 + blocks * LAYOUT.block_tokens)
    headers = {"traceparent": f"00-{number + 1:032x}-{number + 1:016x}-01"}
    return PageSave(block_chain(LAYOUT, tokens), 0, [engine.page_ids], spans.of_headers(headers) if is_traced else None)


def trace_number(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.trace_id) - 1


def test_requests_with_traces_of_their_own_share_reservations(
    engine: Engine, saver: PageSaver, recorder: Recorder
) -> None:
    blocks, asked = engine.blocks, []
    reserve = blocks.reserve

    def counted(chains: Sequence[BlockChain], **options: Any) -> Any:
        asked.append(len(chains))
        return reserve(chains, **options)

    blocks.reserve = counted  # type: ignore[method-assign, assignment]  # It counts the calls of the real one.
    saves = [of_request(number, engine) for number in range(REQUESTS)]
    gathering = saver.gather(saves, SOON_S)
    assert gathering.wait(SOON_S)
    until(lambda: len(recorder.ended) == REQUESTS)

    assert asked == [IN_ONE_CALL] * (REQUESTS // IN_ONE_CALL)
    assert all(blocks.contains(save.chain) for save in saves)
    assert sorted(map(trace_number, recorder.ended)) == list(range(REQUESTS))
    for name, value in (("blocks", 1), ("stored_blocks", 1), ("bytes", LAYOUT.layers * blocks.slice_bytes(32))):
        assert recorder.attributes(name) == [value] * REQUESTS


def test_a_call_is_in_the_first_trace_that_it_has_and_the_other_requests_link_to_it(
    saver: PageSaver, engine: Engine, recorder: Recorder
) -> None:
    saves = [of_request(number, engine, blocks=number + 1, is_traced=number > 0) for number in range(4)]
    called_in = []
    reserve = engine.blocks.reserve

    def watched(chains: Sequence[BlockChain], **options: Any) -> Any:
        called_in.append(opentelemetry.trace.get_current_span().get_span_context())
        return reserve(chains, **options)

    engine.blocks.reserve = watched  # type: ignore[method-assign, assignment]  # As the one above.
    assert saver.gather(saves, SOON_S).wait(SOON_S)
    until(lambda: len(recorder.ended) == 3)

    first, *others = sorted(recorder.ended, key=trace_number)
    assert called_in == [first.context]
    assert not first.links
    assert [[link.context for link in each.links] for each in others] == [[first.context]] * 2
    assert sorted(recorder.attributes("stored_blocks")) == [2, 3, 4]


def fails(*args: object, **options: object) -> Any:
    raise RuntimeError("unexpected")


class FailingMemory:
    """Pages that the daemon has opened."""

    is_ready, save = True, staticmethod(fails)


class ClosedCommits(CpuDevice):
    def stream(self, name: str) -> CpuStream:
        made = super().stream(name)
        if name == "kvservice-commit":
            made.close()
        return made


@pytest.mark.parametrize(
    ("where", "error"),
    [("reserve", "RuntimeError"), ("memory", "RuntimeError"), ("pages", "IndexError"), ("commit", "StreamClosed")],
)
def test_the_spans_end_with_the_error_that_ends_their_save(
    engine: Engine, recorder: Recorder, where: str, error: str
) -> None:
    dropped: list[tuple[str, int]] = []
    if where == "reserve":
        engine.blocks.reserve = fails  # type: ignore[method-assign]
    device = ClosedCommits() if where == "commit" else engine.device
    saver = PageSaver(
        device, engine.blocks, engine.layers, engine.breaker, SYSTEM_CLOCK, staging_bytes=MIB,
        on_dropped=lambda reason, blocks: dropped.append((reason, blocks)),
        memory=FailingMemory() if where == "memory" else None,  # type: ignore[arg-type]
    )  # fmt: skip
    saves = [of_request(number, engine) for number in range(3)]
    if where == "pages":
        saves = [save._replace(page_ids=[]) for save in saves]
    assert saver.gather(saves, SOON_S).wait(SOON_S)
    assert recorder.begun == len(recorder.ended) == 3
    assert [each.attributes["error.type"] for each in recorder.ended if each.attributes] == [error] * 3
    assert sum(blocks for _, blocks in dropped) == 3
    saver.close(SOON_S)
