"""Log lines: the reason is in the message, fields are in both formats, and repeated lines are limited."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kvservice
from kvservice import logs
from kvservice.logs import RateLimit


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], list[str]]]:
    """The lines on standard error since `logs.set_up` was called."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield lambda: capsys.readouterr().err.splitlines()
    root.handlers[:] = handlers
    root.setLevel(level)


def record(second: float, line: int = 1, level: int = logging.WARNING) -> logging.LogRecord:
    made = logging.LogRecord("kvservice.store", level, "store.py", line, "no room: %s", ("full",), None)
    made.created = second
    return made


def test_a_line_has_its_reason_in_the_message_and_its_fields_beside_it_in_both_forms(
    written: Callable[[], list[str]],
) -> None:
    for form in ("json", "text"):
        logs.set_up("info", form)
        logging.getLogger("kvservice.x").warning("no room: %s", "the disk is full", extra={"tier": "ssd"})
    as_json, as_text = written()
    assert json.loads(as_json)["event"] == "no room: the disk is full"
    assert json.loads(as_json)["tier"] == "ssd"
    assert as_text.endswith("WARNING kvservice.x: no room: the disk is full  tier=ssd")


def test_of_one_kind_so_many_lines_of_a_period_are_written_and_later_it_says_how_many_were_not() -> None:
    limit = RateLimit(lines=3, period_s=60)
    assert [limit.filter(record(1000 + second)) for second in range(10)] == [True] * 3 + [False] * 7
    later, last = record(1060), record(1061)
    assert limit.filter(later) and limit.filter(last)
    assert vars(later)["left_out"] == 7
    assert "left_out" not in vars(last)


def test_each_kind_is_limited_separately_for_all_arguments() -> None:
    limit = RateLimit(lines=1, period_s=60)
    assert [limit.filter(record(1000, line)) for line in (1, 2, 1, 2, 3)] == [True, True, False, False, True]


def test_lines_for_debugging_are_not_limited() -> None:
    limit = RateLimit(lines=1, period_s=60)
    assert all(limit.filter(record(1000, level=logging.DEBUG)) for _ in range(10))


def test_a_wall_clock_that_is_set_back_ends_the_period() -> None:
    limit = RateLimit(lines=1, period_s=60)
    assert [limit.filter(record(second)) for second in (1000, 1001, 500, 501)] == [True, False, True, False]


def test_the_daemons_logs_are_limited(written: Callable[[], list[str]]) -> None:
    logs.set_up("info", "json")
    for number in range(1000):
        logging.getLogger("kvservice.x").error("a damaged block was quarantined: %d", number)
    assert len(written()) == 100


def test_no_line_of_the_daemon_leaves_its_reason_to_a_field() -> None:
    """A default formatter prints no fields, so the reason must be in the message."""
    hidden = [
        f"{path.name}: {call}"
        for path in Path(kvservice.__file__).parent.rglob("*.py")
        for call in re.findall(r"log\.\w+\(\s*\"[^%\"]*\",\s*extra=\{\"(?:why|reason|error)\"", path.read_text())
    ]
    assert not hidden
