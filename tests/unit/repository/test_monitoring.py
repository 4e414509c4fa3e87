"""ops/dashboards, ops/alerts and ops/runbooks agree with the metrics and with each other."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvservice.metrics.rows import PREFIX, Sources
from kvservice.metrics.traffic import BULK, BULK_LOAD_ERRORS
from kvservice.rpc.calls import ALERTED, CallCounts
from kvservice_api.v1 import admin_pb2, blocks_pb2, devices_pb2, hints_pb2, sessions_pb2
from tests.prometheus import program
from tools.generate_monitoring import LABELS, expanded

OPS = Path(__file__).parents[3] / "ops"
ALERTS = OPS / "alerts"
DASHBOARD = "dashboards/kvservice.json"


def rules() -> list[dict[str, Any]]:
    yaml: Any = pytest.importorskip("yaml")
    (group,) = yaml.safe_load((ALERTS / "kvservice.rules.yaml").read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


@pytest.mark.parametrize("path", [DASHBOARD, "kubernetes/components/monitoring/alerts.yaml"])
def test_the_file_is_what_make_docs_writes(tmp_path: Path, path: str) -> None:
    subprocess.run([sys.executable, OPS.parent / "tools" / "generate_monitoring.py", tmp_path], check=True)

    assert (OPS / path).read_text() == (tmp_path / path).read_text(), "run `make docs`"


def test_a_query_of_the_dashboard_asks_for_metrics_and_labels_that_exist() -> None:
    chosen = 'job=~"$job", instance=~"$instance"'
    assert expanded('rate(@load_seconds_sum{tier="ssd"}[RATE])') == (
        f'rate(kvservice_load_seconds_sum{{{chosen}, tier="ssd"}}[$__rate_interval])'
    )
    for query in ("@renamed_total", "@clients_count", "@load_seconds"):
        with pytest.raises(ValueError, match="no such series"):
            expanded(query)
    with pytest.raises(ValueError, match="no label"):
        expanded('@load_seconds_sum{reason="x"}')


def test_every_alert_asks_for_metrics_and_labels_that_exist() -> None:
    for rule in rules():
        for name, matchers in re.findall(rf"({PREFIX}\w+)(?:\{{(.*?)\}})?", rule["expr"]):
            labels = LABELS[name.removeprefix(PREFIX)]
            assert {*re.findall(r"(\w+)[=!]", matchers)} <= labels, rule["alert"]


def test_the_first_error_of_each_alerted_reason_is_an_increase() -> None:
    (rule,) = (rule for rule in rules() if rule["alert"] == "KVServiceCallsFail")
    alerted = set(re.findall(r'reason=~"(.*?)"', rule["expr"])[0].split("|"))
    calls = CallCounts()
    for file in (admin_pb2, blocks_pb2, devices_pb2, hints_pb2, sessions_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                calls.add_method(method.name)

    assert {reason for _, reason in calls.errors} == alerted
    for reason, methods in ALERTED.items():
        assert all(calls.errors.get((method, reason)) == 0 for method in methods), reason
        assert {*methods} <= calls.running.keys(), reason
    assert len(calls.errors) < 200, "each is a series"


def test_the_first_load_of_the_bulk_port_that_fails_is_an_increase() -> None:
    (rule,) = (rule for rule in rules() if rule["alert"] == "KVServiceCallsFail")
    alerted = re.findall(r'kind="load", result=~"(.*?)"', rule["expr"])[0].split("|")
    assert sorted(alerted) == sorted(BULK_LOAD_ERRORS)

    (metric,) = (metric for metric in BULK if metric.name == "bulk_transfers_total")
    ended = Counter({("save", "OK"): 2})
    samples = metric.read(cast(Sources, SimpleNamespace(bulk=SimpleNamespace(ended=ended))))
    assert samples == {("save", "OK"): 2, **{("load", reason): 0 for reason in alerted}}


def test_every_alert_has_a_page_and_says_what_a_user_notices() -> None:
    names = [rule["alert"] for rule in rules()]
    pages = {page.stem for page in (OPS / "runbooks").glob("KVService*.md")}

    assert sorted(names) == sorted(pages)
    listed = dict(re.findall(r"\((KVService\w+)\.md\) \| (\w+) \|", (OPS / "runbooks" / "README.md").read_text()))
    assert listed == {rule["alert"]: rule["labels"]["severity"] for rule in rules()}
    for rule in rules():
        assert rule["annotations"].keys() == {"summary", "description", "runbook"}
        assert rule["annotations"]["runbook"] == f"ops/runbooks/{rule['alert']}.md"
        page = (OPS / "runbooks" / f"{rule['alert']}.md").read_text()
        assert page.startswith(f"# {rule['alert']}\n")
        assert re.findall("(?m)^## (.+)$", page) == ["Look", "Do", "Over"]


def test_promtool_fires_every_alert_for_the_fault_only() -> None:
    tests = ALERTS / "kvservice.test.yaml"
    done = subprocess.run(
        [program("promtool"), "test", "rules", str(tests)], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert set(re.findall(r'alertname="(\w+)"', tests.read_text())) == {rule["alert"] for rule in rules()}


def test_prometheus_accepts_the_configuration_of_the_page(tmp_path: Path) -> None:
    page = (OPS.parent / "docs" / "monitoring.md").read_text()
    block = textwrap.dedent(page.partition("```yaml\n")[2].partition("```")[0])
    (tmp_path / "prometheus.yml").write_text(block.replace("/etc/prometheus", str(ALERTS)))
    checked = [program("promtool"), "check", "config", str(tmp_path / "prometheus.yml")]
    done = subprocess.run(checked, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert f"SUCCESS: {len(rules())} rules found" in done.stdout


def test_no_two_panels_of_the_dashboard_overlap() -> None:
    panels = json.loads((OPS / DASHBOARD).read_text())["panels"]
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]

    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)
