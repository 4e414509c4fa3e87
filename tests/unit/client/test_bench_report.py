"""How the benchmark compares and reports. No machine is measured here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from benchmarks.client.command import why_no_shares_of_tcp
from benchmarks.client.report import SECTION, Report
from benchmarks.client.rounds import compare

BEGIN, END = f"<!-- {SECTION}: begin -->", f"<!-- {SECTION}: end -->"


def in_turn(*values: float) -> Callable[[], Mapping[str, float]]:
    """A measure that returns another value at every call, and is slower with another setting."""
    left: Iterator[float] = iter(values)

    def measure() -> Mapping[str, float]:
        value = next(left)
        return {"slow": value / 2, "fast": value}

    return measure


def test_the_limit_is_the_best_setting_before_and_after() -> None:
    found = compare(in_turn(4.0, 4.4), in_turn(2.0), attempts_max=3)

    assert found.limit.value == pytest.approx(4.2)
    assert found.limit.setting == "fast"
    assert found.limit.spread == pytest.approx(0.4 / 4.4)
    assert (found.ours["fast"], found.attempts) == (2.0, 1)


def test_a_spread_over_15_percent_repeats_the_round() -> None:
    found = compare(in_turn(4.0, 5.0, 5.1), in_turn(2.0, 3.0), attempts_max=3)

    assert (found.ours["fast"], found.attempts) == (3.0, 2)
    assert found.limit.value == pytest.approx(5.05)


def test_a_machine_that_never_settles_gives_its_quietest_round() -> None:
    found = compare(in_turn(1.0, 2.0, 3.0, 9.0), in_turn(10.0, 20.0, 30.0), attempts_max=3)

    assert (found.ours["fast"], found.attempts) == (20.0, 3)
    assert found.limit.spread == pytest.approx(1 / 3)


def test_a_limit_measured_already_is_not_measured_again() -> None:
    found = compare(in_turn(4.0), in_turn(2.0), attempts_max=1, before={"earlier": 4.0})

    assert found.limit.value == 4.0


def test_the_table_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(f"# Benchmarks\n\nBefore.\n\n{BEGIN}\nthe one before\n{END}\n\nAfter.\n")
    report = Report(grpc_load_ratio=0.51234, spreads={"tcp_gbps": 0.04}, attempts={"tcp_gbps": 2}, tcp_gbps=3.0)

    report.write_into(page)

    text = page.read_text()
    assert text.startswith("# Benchmarks\n\nBefore.\n\n")
    assert text.endswith(f"{END}\n\nAfter.\n")
    assert "the one before" not in text
    assert "| `grpc_load_ratio` | 0.5123 | at least 0.35 |" in text
    assert "spread 4% in round 2" in text
    assert "| `ssd_read_ratio` | not measured here |" in text


def test_a_page_without_a_table_gets_one_at_its_end(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"

    Report().write_into(page)
    Report().write_into(page)

    assert page.read_text().count(BEGIN) == 1


def test_a_figure_without_a_value_has_its_reason_and_one_with_a_value_none() -> None:
    report = Report(bulk_load_gbps=2.0)

    report.explain(("bulk_load", "cold"), "no port,\nor a firewall")

    assert report.as_json()["not_measured"] == dict.fromkeys(
        ("bulk_load_ratio", "bulk_load_cpu_s_per_gb", "cold_first_layer_ms", "cold_first_layer_ratio"),
        "no port, or a firewall",
    )
    assert ("cold_first_layer_ms", "not measured here", "", "no port, or a firewall") in report.rows()


@pytest.mark.parametrize(
    ("address", "is_compared"),
    [("127.0.0.1:7070", True), ("localhost:7070", True), ("/run/kvservice.sock", True), ("192.0.2.1:7070", False)],
)
def test_only_a_daemon_on_this_host_is_compared_with_tcp_over_its_loopback(address: str, is_compared: bool) -> None:
    assert (why_no_shares_of_tcp(address, with_tls=False) == "") == is_compared
    assert "TLS" in why_no_shares_of_tcp(address, with_tls=True)
