"""The metrics of a real daemon, scraped by HTTP: each counts what real calls did."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvservice.metrics.rows import PREFIX
from kvservice.metrics.table import METRICS
from kvservice_api.errors import InvalidRequest, LeaseExpired, UnknownLayout
from kvservice_api.v1 import admin_pb2, blocks_pb2
from kvservice_client import BlockChain, Client, Durability, Shard, block_chain
from tests.daemon import DaemonProcess, until
from tests.integration.known_blocks import LARGE, SMALL, compare, layers_of, new_chain, save
from tests.integration.wire import Upload, Wire, refused
from tests.layouts import changed

Labels = frozenset[tuple[str, str]]


class Scrape(dict[tuple[str, Labels], float]):
    """All samples, by name without the prefix and by labels."""

    @classmethod
    def of(cls, daemon: DaemonProcess) -> Self:
        families = text_string_to_metric_families(fetch(daemon, "/metrics")[1])
        samples = (sample for family in families for sample in family.samples)
        return cls(((each.name, frozenset(each.labels.items())), each.value) for each in samples)

    def value(self, name: str, **labels: str) -> float:
        """The sum over the series that have these labels."""
        wanted = frozenset(labels.items())
        return sum(value for (full, have), value in self.items() if full == f"kvservice_{name}" and wanted <= have)


class Growth:
    """What has grown since it was made."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self.daemon = daemon
        self._before = Scrape.of(daemon)

    def __call__(self, name: str, **labels: str) -> float:
        return Scrape.of(self.daemon).value(name, **labels) - self._before.value(name, **labels)


def fetch(daemon: DaemonProcess, path: str) -> tuple[int, str]:
    """The status and the body of an HTTP answer."""
    port = daemon.wait_for_log("serving")["metrics_port"]
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    settings: dict[str, Any] = {"server__metrics_address": "127.0.0.1:0", "mover__policy": "lru"}
    process = DaemonProcess(tmp_path_factory.mktemp("daemon"), **settings).start()
    yield process
    process.remove()


@pytest.fixture(scope="module", params=["stream", "in_place"])
def path(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


@pytest.fixture
def client(daemon: DaemonProcess, path: str) -> Iterator[Client]:
    """A client whose loads and saves take this path."""
    with daemon.client("engine", transport={"stream": "grpc", "in_place": "shm"}[path]) as made:
        yield made


@pytest.fixture
def growth(daemon: DaemonProcess) -> Growth:
    return Growth(daemon)


def look_up(wire: Wire, chain: BlockChain, request_id: str = "") -> blocks_pb2.LookupPrefixResponse:
    request = blocks_pb2.LookupPrefixRequest(
        layout_fingerprint=SMALL.fingerprint, keys=chain.packed_keys, request_id=request_id
    )
    answer: blocks_pb2.LookupPrefixResponse = wire.blocks.LookupPrefix(request)
    return answer


def test_lookups_count_hits_by_tier_tokens_and_times(daemon: DaemonProcess, wire: Wire) -> None:
    chain = new_chain(SMALL, 5)
    wire.save(Upload.of(wire, SMALL, chain[:3]).messages())
    with daemon.client() as client:
        save(client, SMALL, chain[:3], Durability.SSD)
        client.evict(chain.keys[1:3], "dram")
    growth, layout = Growth(daemon), SMALL.fingerprint.hex()[:16]
    for _ in range(4):
        assert look_up(wire, chain).hit_blocks == 3

    assert growth("lookup_requested_blocks_total", layout=layout) == 20
    assert growth("lookup_hit_blocks_total", layout=layout, tier="dram") == 4
    assert growth("lookup_hit_blocks_total", layout=layout, tier="ssd") == 8
    assert growth("lookup_hit_tokens_total", layout=layout) == 4 * 3 * SMALL.block_tokens
    assert growth("lookup_seconds_count") == growth("lookup_misses_total") == 4
    assert growth("lookup_seconds_sum") > 0
    scrape = Scrape.of(daemon)
    assert scrape.value("layout_info", layout=layout, model=SMALL.model_id, block_tokens="16") == 1
    assert scrape.value("layout_blocks", layout=layout) >= 3


def test_misses_have_the_reason_that_explain_gives(daemon: DaemonProcess, wire: Wire) -> None:
    chains = {name: new_chain(SMALL, 2) for name in ("evicted", "discarded", "dropped_at_save", "in_part")}
    with daemon.client() as client:
        save(client, SMALL, chains["evicted"], Durability.SSD)
        client.evict(chains["evicted"].keys, "dram")
        client.evict(chains["evicted"].keys, "ssd")
        save(client, SMALL, chains["discarded"])
        client.admin.discard(chains["discarded"].keys)
        one_head = np.zeros(2 * SMALL.slice_bytes(1, SMALL.block_tokens), np.uint8)  # Of both blocks.
        client.open_layout(SMALL, Shard(0, 5, 0, 1)).save(chains["in_part"], [one_head] * 5)
    upload = Upload.of(wire, SMALL, chains["dropped_at_save"])
    upload.commit.checksums = bytes(len(upload.commit.checksums))
    assert len(wire.save(upload.messages()).refused) == 2
    chains["never_stored"] = new_chain(SMALL)
    growth = Growth(daemon)
    for reason, chain in chains.items():
        assert look_up(wire, chain, f"request {reason}").hit_blocks == 0

    for reason in chains:
        request = admin_pb2.ExplainRequest(request_id=f"request {reason}")
        explained = wire.admin.Explain(request).request.lookups[0].miss.reason
        assert admin_pb2.MissReason.Name(explained) == f"MISS_REASON_{reason.upper()}"
        assert growth("lookup_misses_total", reason=reason) == 1
    assert growth("lookup_misses_total") == len(chains)


def test_a_layout_that_differs_from_that_of_the_stored_blocks_is_a_reason(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        save(client, LARGE, new_chain(LARGE))
        other = changed(LARGE, block_tokens=32)
        blocks = client.open_layout(other)
        growth = Growth(daemon)
        blocks.lookup(block_chain(other, range(64)), request_id="other").release()

        assert client.admin.explain_request("other").lookups[0].miss.reason == admin_pb2.MISS_REASON_OTHER_LAYOUT
        assert growth("lookup_misses_total", reason="other_layout", layout=other.fingerprint.hex()[:16]) == 1


def test_series_begin_at_0_before_their_first_event(daemon: DaemonProcess, wire: Wire) -> None:
    layout = changed(SMALL, model_id="not used yet")
    wire.open_layout(layout)
    scrape, name = Scrape.of(daemon), layout.fingerprint.hex()[:16]

    for metric, labels in [
        ("lookup_hit_blocks_total", {"layout": name, "tier": "ssd"}),
        ("lookup_misses_total", {"layout": name, "reason": "quarantined"}),
        ("rpc_errors_total", {"method": "LookupPrefix", "reason": "INTERNAL"}),
        ("save_refused_blocks_total", {"reason": "INDEX_FULL"}),
        ("requests_reported_total", {"plan": "mixed", "outcome": "breaker_open"}),
        ("promotion_seconds_count", {"reason": "read_ahead"}),
    ]:
        assert scrape[f"kvservice_{metric}", frozenset(labels.items())] == 0


def test_limits_are_the_settings(daemon: DaemonProcess) -> None:
    scrape = Scrape.of(daemon)

    limits = {"clients_max": 1024, "sessions_max": 16384, "layouts_max": 256}
    assert {name: scrape.value(name) for name in limits} == limits
    assert scrape.value("transfers_max", kind="save", path="stream") == 256
    assert 0 < scrape.value("index_used_bytes") < scrape.value("index_map_bytes")


def test_loads_count_blocks_bytes_tokens_and_times_on_either_path(client: Client, growth: Growth, path: str) -> None:
    chain = new_chain(SMALL, 4)
    save(client, SMALL, chain)
    for _ in range(3):
        with client.open_layout(SMALL).lookup(chain) as lease:
            compare(lease, SMALL, chain)
    until(lambda: growth("load_seconds_count", path=path) == 3)  # In place it ends when the daemon learns of the end.

    assert growth("load_first_layer_seconds_count", path=path, tier="dram") == 3
    assert growth("load_seconds_count", tier="dram") == growth("load_first_layer_seconds_count") == 3
    assert growth("load_blocks_total", path=path) == growth("load_blocks_total") == 12
    assert growth("load_tokens_total", path=path) == 12 * SMALL.block_tokens
    assert growth("rpc_errors_total") == 0, "the client ends a load in place: no error"
    loaded = 3 * sum(each.nbytes for layer in layers_of(SMALL, chain) for each in layer)
    assert growth("load_bytes_total", path=path) == growth("load_bytes_total") == loaded


def test_a_view_without_a_call_counts_its_blocks_and_has_no_duration(daemon: DaemonProcess, growth: Growth) -> None:
    with daemon.client(transport="shm") as client:
        chain, blocks = new_chain(SMALL, 4), client.open_layout(SMALL)
        save(client, SMALL, chain)
        with blocks.lookup(chain) as lease, lease.view(verify="always"):
            pass
        assert growth("load_blocks_total", path="in_place") == 4
        assert growth("load_seconds_count") == 0


def test_loads_from_ssd_count_its_reads_and_promotions(client: Client, growth: Growth, path: str) -> None:
    chain = new_chain(LARGE, 4)
    save(client, LARGE, chain, Durability.SSD)
    client.evict(chain.keys, "dram")
    with client.open_layout(LARGE).lookup(chain) as lease:
        compare(lease, LARGE, chain)
    until(lambda: growth("load_seconds_count", path=path, tier="ssd") == 1)

    assert growth("load_first_layer_seconds_count", path=path, tier="ssd") == 1
    assert growth("promotion_seconds_count", reason="load") == 1
    until(lambda: growth("promoted_blocks_total") == 4)
    for direction in ("read", "written"):
        assert growth(f"tier_{direction}_bytes_total", tier="ssd") >= growth("promoted_bytes_total") > 0
    assert growth("evicted_blocks_total", tier="dram", reason="request") == 4
    until(lambda: Scrape.of(growth.daemon).value("promoting_blocks") == 0)


def test_saves_count_blocks_bytes_and_times_on_either_path(client: Client, growth: Growth, path: str) -> None:
    chain = new_chain(SMALL, 4)
    save(client, SMALL, chain[:3])
    save(client, SMALL, chain, Durability.SSD)

    assert growth("save_seconds_count", path=path, durability="dram") == 1
    assert growth("save_seconds_count", path=path, durability="ssd") == 1
    assert growth("save_blocks_total", result="stored") == 4
    assert growth("save_blocks_total", result="already_stored") == 3
    assert growth("save_bytes_total") == sum(each.nbytes for layer in layers_of(SMALL, chain) for each in layer)
    until(lambda: Scrape.of(growth.daemon).value("unwritten_blocks") == 0)
    assert Scrape.of(growth.daemon).value("write_queue_blocks", tier="ssd") == 0


def test_refused_blocks_have_the_errors_reason(wire: Wire, growth: Growth) -> None:
    upload = Upload.of(wire, SMALL, new_chain(SMALL, 2))
    upload.commit.checksums = bytes(len(upload.commit.checksums))
    wire.save(upload.messages())

    assert growth("save_blocks_total", result="refused") == 2
    assert growth("save_refused_blocks_total", reason="UPLOAD_CORRUPTED") == 2


def test_calls_and_errors_are_counted_by_method_code_and_reason(wire: Wire, growth: Growth) -> None:
    chain = new_chain(SMALL)
    for _ in range(3):
        with refused(UnknownLayout, ""):
            wire.lookup(changed(SMALL, model_id="never opened"), chain)
    with refused(LeaseExpired, ""):
        wire.load(1)
    with refused(InvalidRequest, "malformed"):
        wire.channel.unary_unary("/kvservice_api.v1.BlockService/RenewLease", None, None)(b"\xff")
    for _ in range(2):
        look_up(wire, chain)

    assert growth("rpc_calls_total", method="LookupPrefix", code="OK") == 2
    assert growth("rpc_calls_total", method="LookupPrefix", code="FAILED_PRECONDITION") == 3
    assert growth("rpc_errors_total", method="LookupPrefix") == 3
    assert growth("rpc_errors_total", method="LookupPrefix", reason="UNKNOWN_LAYOUT") == 3
    assert growth("rpc_errors_total", method="LoadBlocks", reason="LEASE_EXPIRED") == 1
    assert growth("rpc_errors_total", method="RenewLease", reason="INVALID_REQUEST") == 1
    scrape = Scrape.of(growth.daemon)
    assert scrape.value("rpc_calls_running", method="LookupPrefix") == 0
    assert scrape.value("rpc_calls_running", method="Attach") == scrape.value("clients") == 1


def test_pins_sessions_and_leases_are_gauges(daemon: DaemonProcess, wire: Wire) -> None:
    chain = new_chain(SMALL, 3)
    wire.save(Upload.of(wire, SMALL, chain).messages())
    before = Scrape.of(daemon)
    with daemon.client() as client:
        client.admin.pin(chain.keys[:2], ttl_s=600)
    wire.append("conversation", SMALL, chain)
    lease = wire.lookup(SMALL, chain)

    scrape = Scrape.of(daemon)
    assert scrape.value("pinned_blocks") - before.value("pinned_blocks") == 2
    assert scrape.value("pinned_bytes") - before.value("pinned_bytes") >= 2 * SMALL.bytes_per_token * 16
    assert scrape.value("sessions") - before.value("sessions") == 1
    assert scrape.value("leases") == 1
    wire.release(lease.lease_id)
    assert Scrape.of(daemon).value("leases") == 0


def test_the_state_and_the_build_are_labels_of_gauges(daemon: DaemonProcess, wire: Wire) -> None:
    assert Scrape.of(daemon).value("build_info", version=wire.status().version) == 1
    assert Scrape.of(daemon).value("policy_info") == Scrape.of(daemon).value("policy_info", policy="lru") == 1
    list(wire.admin.Drain(admin_pb2.DrainRequest(action=admin_pb2.DRAIN_ACTION_BEGIN)))
    states = {name: Scrape.of(daemon).value("state", state=name) for name in ("serving", "draining", "stopping")}
    health = fetch(daemon, "/healthz")
    list(wire.admin.Drain(admin_pb2.DrainRequest(action=admin_pb2.DRAIN_ACTION_UNDO)))

    assert states == {"serving": 0, "draining": 1, "stopping": 0}
    assert health == (200, "draining\n")
    assert fetch(daemon, "/healthz") == (200, "serving\n")


def test_only_the_paths_of_metrics_and_health_have_an_answer(daemon: DaemonProcess) -> None:
    assert [fetch(daemon, path)[0] for path in ("/", "/metric", "/metrics/", "/favicon.ico")] == [404] * 4
    status, text = fetch(daemon, "/metrics")
    assert status == 200 and "_created" not in text


def test_the_daemon_has_every_metric_of_the_table_with_its_type_labels_and_text(daemon: DaemonProcess) -> None:
    families = {each.name: each for each in text_string_to_metric_families(fetch(daemon, "/metrics")[1])}
    for metric in METRICS:
        family = families[PREFIX + metric.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (metric.kind, metric.meaning)
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels)
    ours = {name for name in families if name.startswith(PREFIX)}
    assert ours == {PREFIX + metric.name.removesuffix("_total") for metric in METRICS}
