"""A real Prometheus that scrapes a daemon. Skips the test where Debian's package prometheus is not installed."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_INTERVAL = "1s"  # Of scrapes, and of the rules' evaluation.
_TIMEOUT_S = 60.0
# Windows of rules that compare now with earlier, or that find a counter that stands still.
_SHORTER = {
    "event_loop_delay_seconds_count[2m]": "event_loop_delay_seconds_count[5s]",
    "blocks_total[1h]))": "blocks_total[10s]))",
    "[1d] offset 1h": "[1h] offset 10s",
}


def program(name: str) -> str:
    """The path of `prometheus` or `promtool`."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed: apt-get install --no-install-recommends prometheus")
    return path


class Prometheus:
    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1"

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """The labels and the value of each series now."""
        found = self._get("query", query=expression)["result"]
        return [(each["metric"], float(each["value"][1])) for each in found]

    def values(self, expression: str, label: str) -> dict[str, float]:
        """The values by this label."""
        return {labels.get(label, ""): value for labels, value in self.query(expression)}

    def wait_for(self, expression: str) -> None:
        """Wait until the query has a result. A comparison has one while it is true."""
        end_s = time.monotonic() + _TIMEOUT_S
        while not self.query(expression):
            assert time.monotonic() < end_s, f"it did not become true: {expression}"
            time.sleep(0.05)  # Each query takes some processor time.

    def wait_for_alert(self, name: str) -> dict[str, str]:
        """Wait until the alert fires. Returns its annotations."""
        self.wait_for(f'ALERTS{{alertname="{name}", alertstate="firing"}}')
        alerts = self._get("alerts")["alerts"]
        return next(each["annotations"] for each in alerts if each["labels"]["alertname"] == name)

    def _get(self, path: str, **parameters: str) -> Any:
        with urllib.request.urlopen(f"{self._url}/{path}?{urllib.parse.urlencode(parameters)}", timeout=30) as answer:
            return json.load(answer)["data"]


@contextlib.contextmanager
def prometheus(folder: Path, target: str, ca: Path, rules: Path) -> Iterator[Prometheus]:
    """Scrapes `target`, which has TLS, as the job kvservice.

    It evaluates the rules without their `for`, and with the shorter windows.
    """
    text = re.sub(r"for: \S+", "for: 0s", rules.read_text())
    for window, shorter in _SHORTER.items():
        assert window in text
        text = text.replace(window, shorter)
    (folder / "rules.yaml").write_text(text)
    scrape = {
        "job_name": "kvservice",
        "scheme": "https",
        "tls_config": {"ca_file": str(ca)},
        "static_configs": [{"targets": [target]}],
    }
    intervals = {"scrape_interval": _INTERVAL, "scrape_timeout": _INTERVAL, "evaluation_interval": _INTERVAL}
    configuration = {"global": intervals, "rule_files": ["rules.yaml"], "scrape_configs": [scrape]}
    (folder / "prometheus.yaml").write_text(json.dumps(configuration))  # JSON is YAML.
    process = subprocess.Popen(
        [
            program("prometheus"),
            f"--config.file={folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            "--web.listen-address=127.0.0.1:0",
            "--scrape.discovery-reload-interval=100ms",  # Of a target. It is 5 s otherwise.
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Prometheus(_port(process))
    finally:
        process.kill()
        process.communicate()


def _port(process: subprocess.Popen[str]) -> int:
    """As its log says, once it answers queries. Its later lines are few, and stay in the pipe."""
    assert process.stderr is not None
    log = ""
    for line in process.stderr:
        log += line
        if "Server is ready" in line:
            break
    found = re.search(r"Listening on.*?:(\d+)", log)
    assert found, log
    return int(found[1])
