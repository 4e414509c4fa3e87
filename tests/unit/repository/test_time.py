"""Time is an argument: rules go by a clock. The modules that read the time themselves are listed, with the reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FILES = {
    str(file.relative_to(ROOT)): file
    for folder in ("kvservice", "proto", "client", "engine_adapter")
    for file in sorted((ROOT / folder).rglob("*.py"))
}

#: What reads the time or waits for it. `asyncio.sleep(0)` is no wait: it gives other tasks a turn.
TIME = {
    "time": {"time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "thread_time", "sleep"},
    "datetime": {"now", "utcnow", "today"},
    "asyncio": {"sleep", "timeout", "timeout_at", "wait_for"},
}
TIMERS = {"call_later", "call_at"}

#: Modules that read the time themselves, what they read, and why that is no rule.
ALLOWED = {
    "kvservice/clock.py": ({"time", "asyncio"}, "the daemon's clock"),
    "client/kvservice_client/retry.py": ({"time"}, "the client's clock"),
    "kvservice/rpc/tls.py": ({"time"}, "the default of an argument: certificates go by the wall clock of the moment"),
    "client/kvservice_client/rate_limited_log.py": ({"time"}, "the default of an argument"),
    "engine_adapter/kvservice_adapter/rates.py": ({"time"}, "the default of an argument"),
    "kvservice/metrics/heartbeat.py": (
        {"time", "call_later"},
        "a measurement: the processor time of the loop's thread, and timers that are cheaper than tasks",
    ),
    "proto/kvservice_api/socket_buffers.py": ({"time"}, "the end of a move: as in C, which goes by the kernel's clock"),
    "proto/kvservice_api/spans.py": ({"time"}, "a measurement: when a span begins and ends"),
    "kvservice/simulate/account.py": ({"time"}, "a measurement: how long the simulation took"),
    "engine_adapter/kvservice_adapter/connectors/transformers/cache.py": ({"time"}, "a measurement: a forward pass"),
    "kvservice/store/mover/write_behind.py": (
        {"call_later"},
        "pauses of very many blocks: too many for tasks",
    ),
    "engine_adapter/kvservice_adapter/device/cpu.py": ({"time"}, "the end of the interpreter, bounded"),
    "client/kvservice_client/cli/top.py": ({"time", "datetime"}, "a program for people, which repeats at an interval"),
    "kvservice/arenas.py": ({"time"}, "a program for people, who read how old a file is"),
    "client/kvservice_client/cli/output.py": ({"datetime"}, "a program for people, who read times of day"),
}


def time_read(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """Line, what is read (a module's name, or a timer's), and how it is written."""
    pauses_of_zero = {
        node.func
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and [ast.dump(each) for each in node.args] == [ast.dump(ast.Constant(0))]
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("time", "asyncio"):
            for name in node.names:
                if name.name in TIME[node.module]:
                    yield node.lineno, node.module, f"from {node.module} import {name.name}"
        if not isinstance(node, ast.Attribute):
            continue
        if node.attr in TIMERS:
            yield node.lineno, node.attr, node.attr
        if isinstance(node.value, ast.Name) and node.attr in TIME.get(node.value.id, ()) and node not in pauses_of_zero:
            yield node.lineno, node.value.id, f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize("name", FILES)
def test_a_module_reads_the_time_only_where_that_is_no_rule(name: str) -> None:
    allowed, _ = ALLOWED.get(name, (set(), ""))
    read = [
        f"line {line}: {written}"
        for line, what, written in time_read(ast.parse(FILES[name].read_text()))
        if what not in allowed
    ]
    assert not read, "a deadline, an expiry, a pause and a limit go by a clock: take it as an argument"


def test_the_list_names_only_modules_that_read_the_time() -> None:
    for name, (allowed, _) in ALLOWED.items():
        assert {what for _, what, _ in time_read(ast.parse(FILES[name].read_text()))} == allowed, name


@pytest.mark.parametrize(
    "source",
    [
        "time.monotonic()",
        "f(clock=time.time)",
        "from time import sleep",
        "async with asyncio.timeout(3): pass",
        "await asyncio.sleep(pause_s)",
        "datetime.now(UTC)",
        "loop.call_later(1, f)",
    ],
)
def test_each_way_to_read_the_time_is_found(source: str) -> None:
    assert list(time_read(ast.parse(source)))


def test_a_turn_of_the_loop_and_a_clock_are_none() -> None:
    assert not list(time_read(ast.parse("await asyncio.sleep(0)\nclock.sleep(3)\nclock.timeout(2)\nclock.wall_ms()")))
