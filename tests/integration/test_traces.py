"""The traces of real requests, from an engine's process through a daemon, as an OTLP receiver gets them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

import pytest

from kvservice_api import spans
from tests.daemon import DaemonProcess
from tests.integration.known_blocks import SMALL, new_chain, save
from tests.integration.traced_engine import CASES, TRACED
from tests.layouts import changed
from tests.otlp_receiver import OtlpReceiver, ReceivedSpan
from tests.process_starter import python_path

SERVICE = "kvservice_api.v1.BlockService"
LAYER_BYTES = 2 * TRACED.slice_bytes(TRACED.kv_heads, TRACED.block_tokens)  # Of the two stored blocks.
LAYERS = TRACED.layers


class Trace:
    """The spans of one request."""

    def __init__(self, spans: Sequence[ReceivedSpan]) -> None:
        self.spans = spans
        (self.root,) = (each for each in spans if each.name == "request")

    def below(self, parent: ReceivedSpan, name: str) -> list[ReceivedSpan]:
        return [each for each in self.spans if each.parent_id == parent.span_id and each.name == name]

    def one(self, *names: str) -> ReceivedSpan:
        """The only span of the last name, found from the root along the names."""
        span = self.root
        for name in names:
            (span,) = self.below(span, name)
        return span


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Trace]]:
    """The trace of each case."""
    last = {  # What ends last of a case.
        "load": {"LoadBlocks", "promote"},
        "load-dram": {"LoadBlocks"},
        "load-in-place": {"LocateBlocks", "promote"},
        "view": {"LocateBlocks"},
        "save": {"SaveBlocks"},
        "save-in-place": {"CommitBlocks"},
        "fail": {"ReleaseLease"},
    }
    daemon = DaemonProcess(tmp_path_factory.mktemp("daemon"), tracing__enabled=True)
    with OtlpReceiver() as receiver:
        try:
            daemon.start(environment=receiver.environment)
            program = [sys.executable, "-m", "tests.integration.traced_engine", daemon.address, *CASES]
            environment = {**os.environ, **receiver.environment, "PYTHONPATH": python_path()}
            ids = subprocess.run(program, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
            yield {
                case: Trace(receiver.wait_for(bytes.fromhex(trace), {"request", *map(_full, last[case])}))
                for case, trace in zip(CASES, ids, strict=True)
            }
        finally:
            daemon.remove()


def _full(name: str) -> str:
    return f"{SERVICE}/{name}" if name[0].isupper() else f"kvservice.{name}"


def test_a_load_from_ssd_is_one_trace_from_the_engine_to_the_disk(traces: Mapping[str, Trace]) -> None:
    trace = traces["load"]

    lookup = trace.one("kvservice.lookup")
    assert (lookup.service, lookup.kind) == ("engine", "client")
    assert lookup.attributes == {"kvservice.blocks": 3, "kvservice.hit_blocks": 2, "kvservice.hit_tokens": 512}
    call = trace.one("kvservice.lookup", f"{SERVICE}/LookupPrefix")
    assert (call.service, call.kind) == ("kvservice", "server")
    assert call.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": f"{SERVICE}/LookupPrefix",
        "rpc.response.status_code": "OK",
    }
    assert trace.one("kvservice.lookup", f"{SERVICE}/LookupPrefix", "kvservice.store.lookup").attributes == {
        "kvservice.blocks": 3,
        "kvservice.hit_blocks": 2,
        "kvservice.hit_blocks.ssd": 2,
        "kvservice.miss_reason": "never_stored",
    }
    load = trace.one("kvservice.load")
    assert load.attributes == {
        "kvservice.blocks": 2,
        "kvservice.layers": LAYERS,
        "kvservice.bytes": LAYERS * LAYER_BYTES,
    }
    layers = trace.below(load, "kvservice.layer")
    assert [each.attributes for each in layers] == [
        {"kvservice.layer": layer, "kvservice.bytes": LAYER_BYTES} for layer in range(LAYERS)
    ]
    served = trace.one("kvservice.load", f"{SERVICE}/LoadBlocks")
    assert [each.attributes for each in trace.below(served, "kvservice.store.layers")] == [
        {
            "kvservice.layer": layer,
            "kvservice.layers": 1,
            "kvservice.blocks": 2,
            "kvservice.bytes": LAYER_BYTES,
            "kvservice.tier": "ssd",
        }
        for layer in range(LAYERS)
    ]
    promote = trace.one("kvservice.load", f"{SERVICE}/LoadBlocks", "kvservice.promote")
    assert {name: promote.attributes[f"kvservice.{name}"] for name in ("tier", "blocks", "reason")} == {
        "tier": "ssd",
        "blocks": 2,
        "reason": "load",
    }
    reads = trace.below(promote, "kvservice.tier.read")
    assert [(each.attributes["kvservice.layer"], each.attributes["kvservice.tier"]) for each in reads] == [
        (0, "ssd"),
        (1, "ssd"),  # And the layers after it: pieces grow.
    ]
    assert sum(each.attributes["kvservice.bytes"] for each in reads) >= LAYERS * LAYER_BYTES
    for each in (*reads, promote):
        assert served.begin_ns <= each.begin_ns <= each.end_ns


def test_a_load_from_dram_has_no_promotion(traces: Mapping[str, Trace]) -> None:
    trace = traces["load-dram"]

    served = trace.one("kvservice.load", f"{SERVICE}/LoadBlocks")
    assert {each.attributes["kvservice.tier"] for each in trace.below(served, "kvservice.store.layers")} == {"dram"}
    assert not trace.below(served, "kvservice.promote")


def test_a_load_in_place_has_spans_of_its_layers_and_of_the_promotion(traces: Mapping[str, Trace]) -> None:
    trace = traces["load-in-place"]

    assert len(trace.below(trace.one("kvservice.load"), "kvservice.layer")) == LAYERS
    served = trace.one("kvservice.load", f"{SERVICE}/LocateBlocks")
    ready = trace.below(served, "kvservice.store.layers")
    assert sum(each.attributes["kvservice.layers"] for each in ready) == LAYERS
    assert sum(each.attributes["kvservice.bytes"] for each in ready) == LAYERS * LAYER_BYTES
    assert trace.below(served, "kvservice.promote")
    assert not served.has_failed


def test_a_view_of_an_adopted_lease_has_spans_of_its_layers(traces: Mapping[str, Trace]) -> None:
    trace = traces["view"]

    view = trace.one("kvservice.view")
    assert [each.attributes["kvservice.layer"] for each in trace.below(view, "kvservice.layer")] == list(range(LAYERS))
    assert trace.below(view, f"{SERVICE}/LocateBlocks")
    assert trace.one(f"{SERVICE}/AdoptLease")
    assert trace.one("kvservice.lookup", f"{SERVICE}/LookupPrefix")


@pytest.mark.parametrize(
    ("case", "calls"), [("save", ["SaveBlocks"]), ("save-in-place", ["ReserveBlocks", "CommitBlocks"])]
)
def test_a_save_has_its_bytes_and_its_calls(traces: Mapping[str, Trace], case: str, calls: list[str]) -> None:
    save = traces[case].one("kvservice.save")

    assert save.attributes == {
        "kvservice.blocks": 2,
        "kvservice.bytes": LAYERS * LAYER_BYTES,
        "kvservice.stored_blocks": 2,
        "kvservice.refused_blocks": 0,
    }
    for call in calls:
        traces[case].one("kvservice.save", f"{SERVICE}/{call}")


def test_a_load_that_fails_says_why(traces: Mapping[str, Trace]) -> None:
    load = traces["fail"].one("kvservice.load")

    assert load.has_failed
    assert load.attributes["error.type"] == "LEASE_EXPIRED"


@pytest.mark.parametrize(("transport", "expected"), [("grpc", ["current", "headers", "current"]), ("shm", ["current"])])
def test_outside_of_a_trace_no_layer_of_a_load_costs_anything(
    daemon: DaemonProcess, transport: str, expected: list[str]
) -> None:
    """The calls into the module of the spans are those of the load and of its RPC, however many layers it has. A load
    in place has no RPC.
    """
    calls: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename == spans.__file__:
            calls.append(frame.f_code.co_name)

    with daemon.client(transport=transport) as client:
        for layers in (2, 20):
            layout = changed(SMALL, layers=layers)
            chain = new_chain(layout)
            save(client, layout, chain)
            with client.open_layout(layout).lookup(chain) as lease:
                sys.setprofile(note)
                try:
                    loaded = len(list(lease.load()))
                finally:
                    sys.setprofile(None)
            assert loaded == layers
            made = [each for each in calls if each != "contained"]
            assert made == expected
            assert len(calls) == 2 * len(made), "each is contained once"
            calls.clear()


def test_without_tracing_neither_side_imports_opentelemetry(tmp_path: Path) -> None:
    """A daemon with the default settings, and a client that looks up, saves and loads."""
    program = """
import sys
from kvservice.__main__ import main
code = main()
print("imported", [name for name in sys.modules if name.startswith("opentelemetry")], file=sys.stderr)
sys.exit(code)
"""
    engine = """
import sys
from kvservice_client import Client
from tests.integration.known_blocks import SMALL, compare, new_chain, save

for transport in ("grpc", "shm"):
    with Client(sys.argv[1], transport=transport) as client:
        chain = new_chain(SMALL)
        save(client, SMALL, chain)
        with client.open_layout(SMALL).lookup(chain) as lease:
            compare(lease, SMALL, chain)
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    daemon = DaemonProcess(tmp_path, program=("-c", program))
    with daemon:
        environment = {**os.environ, "PYTHONPATH": python_path()}
        command = [sys.executable, "-c", engine, daemon.address]
        assert subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout == "[]\n"
        assert daemon.stop() == 0
    assert any(line.strip() == "imported []" for line in daemon.lines)
