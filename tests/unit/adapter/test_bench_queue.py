"""The report of the queue benchmark, and its wrong arguments."""

from __future__ import annotations

import sys
from xml.etree import ElementTree

import pytest

from benchmarks.queue import __main__ as command
from benchmarks.queue.conversations import Served, Way
from benchmarks.queue.report import picture, rows_of, table


def served(*times_s: float, tier: str = "") -> list[Served]:
    return [Served(each, [1], tier, each / 10) for each in times_s]


RESULTS = {
    Way("computed again", ""): [served(2.0, 4.0), served(4.0, 8.0), served(3.0, 6.0)],
    Way("lru & more", "lru"): [served(1.0, 2.0), served(1.0, 2.0), served(9.0, 9.0, tier="dram")],
}


def test_a_row_has_medians_of_rounds_and_ratios_to_the_same_round_of_the_first_way() -> None:
    first, second = rows_of(RESULTS)
    assert (first.mean_s, first.mean_ratio, first.p99_ratio, first.in_dram) == (4.5, 1.0, 1.0, 0.0)
    assert (second.mean_s, second.mean_ratio) == (1.5, 0.5)
    assert second.in_dram == pytest.approx(1 / 3)
    assert second.load_s == pytest.approx(0.2)
    lines = table([first, second])
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {8}


def test_the_picture_has_two_bars_per_way() -> None:
    root = ElementTree.fromstring(picture(rows_of(RESULTS), "A title"))
    bars = [each for each in root if each.tag.endswith("rect") and float(each.get("x", 0)) == 190]
    assert len(bars) == 1 + 4, "the legend's first square begins there too"
    assert "lru & more" in [each.text for each in root]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sglang"], "no engine is called sglang"),
        (["transformers", "--conversations", "2"], "--conversations at least 3"),
        (["transformers", "--quick", "--turns", "4"], "--quick has a size of its own"),
        (["transformers", "--rounds", "0"], "must be at least 1"),
        (["transformers", "--history", "5000"], "it may have 4095"),
        (["transformers", "--policies", "belady"], "the daemon has no belady"),
        (["transformers", "--write", "/no/such/folder/page.md"], "there is no folder"),
        (["vllm"], "vLLM is not installed here"),
    ],
)
def test_a_wrong_argument_is_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["queue", *arguments])
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
