"""A real Prometheus scrapes a real daemon under load: every query of the dashboard has data, and alerts fire.

The tests run in their order, on one daemon: the last one stops it.
"""

from __future__ import annotations

import json
import math
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import pytest

from kvservice_api.errors import ChecksumMismatch, Overloaded
from kvservice_api.v1 import admin_pb2
from kvservice_client import BlockChain, Client, Durability, Outcome, RequestReport, Tier
from tests.certificates import Authority, replace
from tests.daemon import MIB, DaemonProcess, until
from tests.integration.known_blocks import LARGE, SMALL, compare, new_chain, save
from tests.integration.media import arena, flip_data
from tests.integration.test_faults_disk import Faults
from tests.integration.wire import Upload, Wire
from tests.prometheus import program, prometheus

OPS = Path(__file__).parents[2] / "ops"
EXPRESSIONS = {
    f"{panel['title']}: {target['legendFormat']}": target["expr"]
    for panel in json.loads((OPS / "dashboards" / "kvservice.json").read_text())["panels"]
    for target in panel.get("targets", [])
}
CLIENTS_MAX = 4
SSD_BYTES = 32 * MIB


class Site:
    """A daemon with TLS whose disk can fail, and the Prometheus that scrapes it."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        program("prometheus")  # Skips the tests where it is missing.
        authority = Authority()
        certificate, key = authority.issue(valid_until=datetime.now(UTC) + timedelta(days=3)).write(folder)
        self.certificate = certificate
        self.faults = Faults(folder / "faults")
        self.daemon = DaemonProcess(
            folder,
            program=("-m", "tests.faulty_daemon"),
            server__metrics_address="127.0.0.1:0",
            server__clients_max=CLIENTS_MAX,
            tls__certificate=certificate,
            tls__key=key,
            dram__capacity_bytes=16 * MIB,
            ssd__capacity_bytes=SSD_BYTES,
        )
        stack.callback(self.daemon.remove)
        self.start()
        target = f"127.0.0.1:{self.daemon.wait_for_log('serving')['metrics_port']}"
        self.daemon.settings["server.metrics_address"] = target  # A restart takes the same port again.
        ca, rules = authority.write(folder), OPS / "alerts" / "kvservice.rules.yaml"
        self.prometheus = stack.enter_context(prometheus(folder, target, ca, rules))
        self.reasons: Counter[str] = Counter()  # Of the misses, as `explain` says them.

    def start(self) -> None:
        self.daemon.start(environment={"TEST_FAULTS": str(self.faults.folder)})

    def client(self, transport: Literal["grpc", "shm"] = "grpc") -> Client:
        return Client(str(self.daemon.socket_path), name=transport, transport=transport, timeout_s=30.0)

    def use(self) -> None:
        """Saves, hits, misses, loads from each tier by each path, and a report of a request."""
        transports: tuple[Literal["grpc", "shm"], ...] = ("grpc", "shm")
        for transport in transports:
            with self.client(transport) as client:
                for durability in (Durability.DRAM, Durability.SSD):
                    chain = new_chain(LARGE, 8)
                    save(client, LARGE, chain, durability)
                    self.load(client, chain)
                client.evict(chain.keys, "dram")
                self.load(client, chain)
        with self.client() as client:
            client.evict(chain.keys[4:], Tier.DRAM)
            client.evict(chain.keys[4:], Tier.SSD)
            missing = {"never": new_chain(LARGE, 2), "never again": new_chain(LARGE), "evicted": chain}
            for name, wanted in missing.items():
                client.open_layout(LARGE).lookup(wanted, request_id=name).release()
                (lookup,) = client.admin.explain_request(name).lookups
                self.reasons[admin_pb2.MissReason.Name(lookup.miss.reason).removeprefix("MISS_REASON_").lower()] += 1
            client.report_request(RequestReport(request_id="never", outcome=Outcome.MISS))

    @staticmethod
    def load(client: Client, chain: BlockChain) -> None:
        with client.open_layout(LARGE).lookup(chain) as lease:
            assert lease.hit_blocks == len(chain)
            compare(lease, LARGE, chain)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with ExitStack() as stack:
        made = Site(tmp_path_factory.mktemp("site"), stack)
        with made.client() as client:
            client.open_layout(LARGE).contains(new_chain(LARGE))
        made.prometheus.wait_for("kvservice_lookup_misses_total")  # At 0: the first event counts too.
        made.use()
        made.prometheus.wait_for('kvservice_requests_reported_total{outcome="miss"} > 0')
        yield made


def shown(expression: str) -> str:
    """The query as Grafana sends it."""
    chosen = expression.replace("$job", "kvservice").replace("$instance", ".+")
    return chosen.replace("$__rate_interval", "1m")


def test_every_query_of_the_dashboard_has_data(site: Site) -> None:
    found = {name: site.prometheus.query(shown(expression)) for name, expression in EXPRESSIONS.items()}

    without = {name for name, series in found.items() if not any(math.isfinite(value) for _, value in series)}
    assert not without


def test_a_query_sees_the_first_event_of_a_series(site: Site) -> None:
    """Prometheus has 3 misses: `increase` extrapolates, and has more than 2."""
    found = site.prometheus.query("sum(increase(kvservice_lookup_misses_total[1m]))")

    assert found[0][1] > 2


def test_misses_are_those_that_explain_names(site: Site) -> None:
    counted = site.prometheus.values("sum by (reason) (kvservice_lookup_misses_total) > 0", "reason")

    assert counted == site.reasons
    assert site.reasons == {"never_stored": 2, "evicted": 1}


def test_a_healthy_daemon_has_no_alert_but_that_of_its_certificate(site: Site) -> None:
    annotations = site.prometheus.wait_for_alert("KVServiceCertificateExpires")
    assert re.search("expires in 2d 23h", annotations["summary"])

    # On a busy machine the event loop is late. Without its time of waiting, a short queue of writes is an alert too.
    others = 'alertname!~"KVServiceCertificateExpires|KVServiceEventLoopStalls"'
    site.prometheus.wait_for(f'absent(ALERTS{{alertstate="firing", {others}}})')


def test_a_disk_that_takes_no_writes_is_alerted(site: Site) -> None:
    with site.client() as client:
        site.faults.set("pwritev", "ENOSPC")
        assert len(save(client, LARGE, new_chain(LARGE, 4), Durability.SSD).refused) == 4
        for _ in range(5):
            save(client, LARGE, new_chain(LARGE, 8))
        for alert in ("TierRefusesBlocks", "StorageErrors", "WriteBehindSlow"):
            site.prometheus.wait_for_alert(f"KVService{alert}")
        site.faults.clear()
        site.prometheus.wait_for('absent(ALERTS{alertname="KVServiceTierRefusesBlocks"})')


def test_refused_blocks_are_alerted(site: Site) -> None:
    with Wire(f"unix:{site.daemon.socket_path}") as wire:
        wire.attach()
        wire.open_layout(SMALL)
        upload = Upload.of(wire, SMALL, new_chain(SMALL, 20))
        upload.commit.checksums = bytes(len(upload.commit.checksums))
        assert len(wire.save(upload.messages()).refused) == 20
    assert site.prometheus.wait_for_alert("KVServiceSavesRefused")["summary"].endswith("with UPLOAD_CORRUPTED")


def test_a_block_whose_bytes_changed_is_alerted(site: Site) -> None:
    chain = new_chain(SMALL)
    with site.client() as client:
        save(client, SMALL, chain)
        with client.open_layout(SMALL).lookup(chain) as lease:
            flip_data(arena(site.daemon), SMALL, chain.keys[0], random.Random(1))
            with pytest.raises(ChecksumMismatch):
                compare(lease, SMALL, chain)
    site.prometheus.wait_for('ALERTS{alertname="KVServiceCallsFail", reason="CHECKSUM_MISMATCH"}')  # Its first one.
    summary = site.prometheus.wait_for_alert("KVServiceBlocksQuarantined")["summary"]
    assert summary.startswith(("1.", "1 "))


def test_clients_up_to_the_limit_and_refused_ones_are_alerted(site: Site) -> None:
    with ExitStack() as stack:
        for _ in range(CLIENTS_MAX):
            stack.enter_context(site.client()).open_layout(LARGE).contains(new_chain(LARGE))
        for _ in range(3):
            with pytest.raises(Overloaded), site.client() as one_more:
                one_more.open_layout(LARGE).contains(new_chain(LARGE))
        summary = site.prometheus.wait_for_alert("KVServiceNearLimit")["summary"]
        assert summary.endswith("has used 100% of server.clients_max")
        firing = 'alertname="KVServiceCallsFail", alertstate="firing"'
        site.prometheus.wait_for(f'ALERTS{{{firing}, reason="OVERLOADED"}}')


def test_stalls_of_the_event_loop_are_alerted(site: Site) -> None:
    with site.client() as client:
        for _ in range(10):
            with site.daemon.stopped():
                time.sleep(0.1)  # A stall: a heartbeat is due at least once each 40 ms.
            client.admin.status()  # The loop has run, so the next stall is another one.
    site.prometheus.wait_for_alert("KVServiceEventLoopStalls")


def test_an_event_loop_that_hangs_is_alerted(site: Site) -> None:
    """The metrics have a thread of their own, which answers meanwhile."""
    site.faults.set("loop", "HOLD")
    site.daemon.process.send_signal(signal.SIGUSR1)
    summary = site.prometheus.wait_for_alert("KVServiceHung")["summary"]
    assert summary.endswith("has not run for minutes")
    site.faults.clear()
    site.prometheus.wait_for('absent(ALERTS{alertname="KVServiceHung"})')


def test_a_policy_that_fails_is_alerted(site: Site) -> None:
    site.faults.set("policy", "EINVAL")
    with site.client() as client:
        for _ in range(32):  # Four times what DRAM has.
            assert save(client, LARGE, new_chain(LARGE, 8)).is_complete
    site.prometheus.wait_for_alert("KVServicePolicyFails")
    site.faults.clear()


def test_lookups_that_find_less_than_before_are_alerted(site: Site) -> None:
    firing = 'ALERTS{alertname="KVServiceHitRatioCollapsed", alertstate="firing"}'
    with site.client() as client:
        blocks, missing = client.open_layout(LARGE), new_chain(LARGE, 8)

        def look_up() -> bool:
            blocks.lookup(missing).release()
            return bool(site.prometheus.query(firing))

        until(look_up)
    assert "find 0% of the blocks" in site.prometheus.wait_for_alert("KVServiceHitRatioCollapsed")["summary"]


def test_a_tier_that_did_not_get_its_size_is_alerted(site: Site) -> None:
    assert site.daemon.stop() == 0
    site.faults.set("posix_fallocate", "ENOSPC")
    site.daemon.settings["dram.capacity_bytes"] = 24 * MIB
    site.start()
    summary = site.prometheus.wait_for_alert("KVServiceTierSmallerThanConfigured")["summary"]
    assert re.fullmatch(r"The tier dram of \S+ has only 11\.98MiB", summary)


def test_tls_files_that_cannot_be_used_are_alerted(site: Site) -> None:
    replace(site.certificate, b"no certificate")
    site.prometheus.wait_for_alert("KVServiceTlsFilesRefused")


def test_more_writes_than_the_tier_has_bytes_are_alerted(site: Site) -> None:
    with site.client() as client:
        chains = [new_chain(LARGE, 8) for _ in range(24)]  # 36 MiB.
        for chain in chains:
            save(client, LARGE, chain, Durability.SSD)
    assert site.prometheus.wait_for_alert("KVServiceDriveWear")["summary"].startswith("The tier ssd")


def test_a_drain_is_alerted_until_it_is_undone(site: Site) -> None:
    with site.client() as client:
        list(client.admin.drain())
        site.prometheus.wait_for_alert("KVServiceDrainingForLong")
        client.admin.undo_drain()
    site.prometheus.wait_for('absent(ALERTS{alertname="KVServiceDrainingForLong"})')


def test_a_daemon_whose_process_stands_still_is_alerted_as_down(site: Site) -> None:
    with site.daemon.stopped():
        site.prometheus.wait_for_alert("KVServiceDown")
    site.prometheus.wait_for('absent(ALERTS{alertname="KVServiceDown"})')


def test_a_daemon_that_has_ended_is_alerted(site: Site) -> None:
    assert site.daemon.stop() == 0
    summary = site.prometheus.wait_for_alert("KVServiceDown")["summary"]
    assert re.fullmatch(r"127\.0\.0\.1:\d+ does not answer Prometheus", summary)
