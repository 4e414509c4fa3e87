"""Reports of requests: sent behind the engine's back, kept while the daemon is away, bounded."""

from __future__ import annotations

import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kvservice_api.errors import DeadlineExceeded, InvalidRequest, RequestNotFound
from kvservice_client import Client, Outcome, RequestReport
from kvservice_client.channel import Channel
from tests.clock import ClientClock
from tests.daemon import NEVER_S, SOON_S, DaemonProcess, until

NewDaemon = Callable[..., DaemonProcess]


def report(request_id: str, plan: str = "load", outcome: Outcome = Outcome.DONE) -> RequestReport:
    return RequestReport(request_id=request_id, outcome=outcome, plan=plan)


def reports_of(client: Client, request_id: str) -> int:
    try:
        return len(client.admin.explain_request(request_id).reports)
    except RequestNotFound:
        return 0


def test_the_daemon_counts_plans_and_outcomes(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(server__metrics_address="127.0.0.1:0")
    with daemon.client() as client:
        client.report_request(report("one"))
        client.report_request(report("two", "mixed", Outcome.FAILED_OVER))
        client.report_request(report("three", "", Outcome.BREAKER_OPEN))
        until(lambda: reports_of(client, "three") == 1)
    port = daemon.wait_for_log("serving")["metrics_port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    for plan, outcome in (("load", "done"), ("mixed", "failed_over"), ("none", "breaker_open")):
        assert f'kvservice_requests_reported_total{{outcome="{outcome}",plan="{plan}"}} 1.0' in lines


def test_reports_wait_for_a_daemon_that_is_away_and_come_once(new_daemon: NewDaemon) -> None:
    daemon = new_daemon()
    with daemon.client() as client:
        client.report_request(report("before"))
        until(lambda: reports_of(client, "before") == 1)
        daemon.kill()
        for number in range(3):
            client.report_request(report(f"away {number}", "", Outcome.BREAKER_OPEN))
        daemon.start()
        until(lambda: reports_of(client, "away 2") == 1)
        assert [reports_of(client, f"away {number}") for number in range(3)] == [1, 1, 1]


def test_a_report_that_waited_tells_when_its_request_began_by_the_clients_clock(new_daemon: NewDaemon) -> None:
    daemon, clock = new_daemon(), ClientClock()
    with daemon.client(clock=clock) as client:
        client.report_request(report("before"))
        with daemon.client() as watcher:
            until(lambda: reports_of(watcher, "before") == 1)
        daemon.kill()
        client.report_request(report("away"))
        client.report_request(replace(report("began earlier"), began_s=clock.now_s() - 1000))
        clock.advance(seconds=3000)
        daemon.start()
        with daemon.client() as watcher:
            until(lambda: reports_of(watcher, "began earlier") == 1)
            began_s = [
                watcher.admin.explain_request(request_id).reports[0].at.ToMilliseconds() / 1e3
                for request_id in ("began earlier", "away")
            ]
    now_s = time.time()
    assert [now_s - each for each in began_s] == pytest.approx([4000, 3000], abs=SOON_S)


def test_a_report_whose_answer_was_lost_is_sent_again_and_counts_once(
    new_daemon: NewDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvservice_client.reports._PAUSE_S", 0.01)
    call, arrived = Channel.call, []

    def losing(channel: Channel, method: str, *arguments: Any) -> Any:
        answer = call(channel, method, *arguments)
        if method.endswith("ReportRequest"):
            arrived.append(method)
            if len(arrived) < 3:
                raise DeadlineExceeded("the answer is lost")
        return answer

    monkeypatch.setattr(Channel, "call", losing)
    with new_daemon().client() as client:
        client.report_request(report("thrice"))
        client.report_request(report("last"))
        until(lambda: reports_of(client, "last") == 1)
        until(lambda: len(arrived) == 4)  # The client's thread learns of the answer after the daemon has counted.
        assert reports_of(client, "thrice") == 1


def test_a_daemon_that_hangs_keeps_nobody_who_reports(new_daemon: NewDaemon) -> None:
    daemon = new_daemon()
    with daemon.client(timeout_s=NEVER_S) as client:
        client.report_request(report("before"))
        until(lambda: reports_of(client, "before") == 1)
        os.kill(daemon.process.pid, signal.SIGSTOP)
        try:
            began_s = time.monotonic()
            for number in range(100):
                client.report_request(report(f"meanwhile {number}"))
            assert time.monotonic() - began_s < SOON_S, "each would have waited for a second, and longer"
        finally:
            os.kill(daemon.process.pid, signal.SIGCONT)
        until(lambda: reports_of(client, "meanwhile 99") == 1)


def test_only_the_last_reports_are_kept_and_the_others_counted(new_daemon: NewDaemon) -> None:
    daemon = new_daemon()
    with daemon.client() as client:
        client.report_request(report("before"))
        until(lambda: reports_of(client, "before") == 1)
        daemon.kill()
        for number in range(400):
            client.report_request(report(f"number {number}"))
        reporter = client._connection.reporter
        assert len(reporter._queue) <= 256
        daemon.start()
        until(lambda: reports_of(client, "number 399") == 1)
        assert reports_of(client, "number 0") == 0
        assert reporter.dropped == sum(reports_of(client, f"number {number}") == 0 for number in range(400))


def test_a_report_that_the_daemon_refuses_is_dropped_and_holds_up_no_other(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        client.report_request(report("x" * 201))
        client.report_request(report("next"))
        until(lambda: reports_of(client, "next") == 1)
        assert client._connection.reporter.dropped == 1
        with pytest.raises(InvalidRequest, match="no plan is called 'hope'"):
            client.report_request(report("odd", "hope"))


def test_texts_are_cut_to_what_the_daemon_takes(daemon: DaemonProcess) -> None:
    with daemon.client(name="engine\n" + "é" * 150) as client:
        long = RequestReport(request_id="long", outcome=Outcome.DONE, plan_reason="ü" * 150, outcome_reason="a\tb")
        client.report_request(long)
        until(lambda: reports_of(client, "long") == 1)
        told = client.admin.explain_request("long").reports[0].report
        assert (told.plan_reason, told.outcome_reason) == ("ü" * 100, "a b")


def test_closing_sends_what_is_queued_and_leaves_no_thread(daemon: DaemonProcess) -> None:
    with daemon.client() as watcher:
        with daemon.client() as client:
            for number in range(20):
                client.report_request(report(f"late {number}"))
        assert [reports_of(watcher, f"late {number}") for number in range(20)] == [1] * 20
        assert "kvservice-reports" not in [thread.name for thread in threading.enumerate()]
        client.report_request(report("too late"))
        assert client._connection.reporter.dropped == 1


def test_a_client_that_is_forgotten_ends_its_thread(daemon: DaemonProcess) -> None:
    client = daemon.client()
    client.report_request(report("forgotten"))
    until(lambda: "kvservice-reports" in [thread.name for thread in threading.enumerate()])
    del client
    until(lambda: "kvservice-reports" not in [thread.name for thread in threading.enumerate()])
