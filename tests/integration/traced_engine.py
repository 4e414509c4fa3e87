"""An engine whose requests are traced: `python -m tests.integration.traced_engine ADDRESS CASE ...` runs them.

Prints the id of each request's trace.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import opentelemetry.trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from kvservice_api.errors import LeaseExpired
from kvservice_client import BlockCache, Client, Durability, Layout
from tests.integration.known_blocks import layers_of, new_chain

# Images of 2 MiB, whose four layers are read in two pieces.
TRACED = Layout("known/traced", "float16", layers=4, kv_heads=8, k_head_dim=64, v_head_dim=64, block_tokens=256)


def load(blocks: BlockCache) -> None:
    """The stored prefix is loaded on another thread than that of the request, as engines do."""
    with blocks.lookup(new_chain(TRACED, 3, "stored")) as lease, ThreadPoolExecutor(1) as thread:
        assert lease.hit_blocks == 2
        assert len(thread.submit(lambda: list(lease.load())).result()) == TRACED.layers


def view(blocks: BlockCache) -> None:
    pending = blocks.begin_lookup(new_chain(TRACED, 2, "stored"), adoptions=1)
    assert pending.wait(60)
    found = pending.poll()
    assert found is not None
    with blocks.adopt(found.ticket) as lease, lease.view(verify="always", layer_timeout_s=60) as blocks_in_place:
        for layer in range(TRACED.layers):
            blocks_in_place.slices(layer)


def save(blocks: BlockCache) -> None:
    chain = new_chain(TRACED, 2)
    assert blocks.save(chain, layers_of(TRACED, chain)).stored == 2


def fail(blocks: BlockCache) -> None:
    lease = blocks.lookup(new_chain(TRACED, 2, "stored"))
    layers = lease.load()
    lease.release()
    with suppress(LeaseExpired):
        next(layers)


# The name of a case: what it does, the client's transport, and the tier that has the stored blocks.
CASES: dict[str, tuple[Callable[[BlockCache], None], str, str]] = {
    "load": (load, "grpc", "ssd"),
    "load-dram": (load, "grpc", "dram"),
    "load-in-place": (load, "shm", "ssd"),
    "view": (view, "shm", "dram"),
    "save": (save, "grpc", "dram"),
    "save-in-place": (save, "shm", "dram"),
    "fail": (fail, "grpc", "dram"),
}


def main(address: str, *cases: str) -> None:
    provider = TracerProvider(resource=Resource.create({"service.name": "engine"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    opentelemetry.trace.set_tracer_provider(provider)
    stored = new_chain(TRACED, 2, "stored")
    with Client(address) as client:
        client.open_layout(TRACED).save(stored, layers_of(TRACED, stored), Durability.SSD)
    for name in cases:
        run, transport, tier = CASES[name]
        with Client(address, name="traced", transport=transport) as client:  # type: ignore[arg-type]  # One of three.
            blocks = client.open_layout(TRACED)
            blocks.ping()
            if tier == "ssd":
                assert client.evict(stored, "dram").evicted == 2
            with opentelemetry.trace.get_tracer("engine").start_as_current_span("request") as request:
                run(blocks)
            print(f"{request.get_span_context().trace_id:032x}", flush=True)
    provider.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
