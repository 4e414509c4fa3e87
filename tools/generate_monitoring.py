"""Writes the files for monitoring that are derived from the code: `python tools/generate_monitoring.py [FOLDER]`.

These are Grafana's dashboard, and the alerts as an object of the Prometheus Operator. Run by `make docs`, and by the
test that compares `ops/` with its output.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

from kvservice.metrics.rows import PREFIX
from kvservice.metrics.table import METRICS

OPS = Path(__file__).resolve().parent.parent / "ops"
DASHBOARD = Path("dashboards", "kvservice.json")
RULES = Path("alerts", "kvservice.rules.yaml")
OPERATOR_RULES = Path("kubernetes", "components", "monitoring", "alerts.yaml")

LABELS = {  # Of each series, by its name without the prefix.
    metric.name + suffix: {*metric.labels, *(["le"] if suffix == "_bucket" else [])}
    for metric in METRICS
    for suffix in (("_bucket", "_count", "_sum") if metric.kind == "histogram" else ("",))
}
_METRIC = re.compile(r"@(\w+)(?:\{([^}]*)\})?")
_CHOSEN = 'job=~"$job", instance=~"$instance"'
_PANEL_WIDTH, _PANEL_HEIGHT, _PANELS_A_LINE = 8, 8, 3
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def expanded(query: str) -> str:
    """PromQL, from text that has `@name` or `@name{label="value"}` for a metric of the table, of the chosen instances.

    `RATE` is the range for `rate`. Raises ValueError if there is no such series, or if it has no such label.
    """

    def selector(found: re.Match[str]) -> str:
        name, matchers = found[1], found[2] or ""
        if name not in LABELS:
            raise ValueError(f"there is no such series: {name}")
        if unknown := {*re.findall(r"(\w+)[=!]", matchers)} - LABELS[name]:
            raise ValueError(f"{name} has no label {unknown}")
        return f"{PREFIX}{name}{{{', '.join(filter(None, (_CHOSEN, matchers)))}}}"

    return _METRIC.sub(selector, query).replace("RATE", "$__rate_interval")


@dataclass(frozen=True, slots=True)
class Panel:
    """`queries` by the legends of their series. `unit` is Grafana's name of one."""

    title: str
    unit: str
    description: str
    queries: Mapping[str, str]
    is_stacked: bool = False
    kind: Literal["timeseries", "stat"] = "timeseries"


def quantiles(title: str, histogram: str, by: str, description: str) -> Panel:
    """Median and 99th percentile of a histogram of seconds, by labels that are separated by commas."""
    legend = " ".join(f"{{{{{label.strip()}}}}}" for label in by.split(",") if by)
    grouped = f"sum by ({', '.join(filter(None, ('le', by)))}) (rate(@{histogram}_bucket[RATE]))"
    shares = {"median": 0.5, "99 %": 0.99}
    queries = {f"{name} {legend}".strip(): f"histogram_quantile({at}, {grouped})" for name, at in shares.items()}
    return Panel(title, "s", description, queries)


SECTIONS: Mapping[str, Sequence[Panel]] = {
    "What does it save?": (
        Panel(
            "Hit ratio by tier",
            "percentunit",
            "Blocks that lookups found, over those that they asked for, by their fastest tier. Lookups that an engine "
            "answers from the residency directory are not counted.",
            {
                "{{tier}}": "sum by (tier) (rate(@lookup_hit_blocks_total[RATE])) / on () group_left () "
                "sum(rate(@lookup_requested_blocks_total[RATE]))"
            },
            is_stacked=True,
        ),
        Panel(
            "Tokens loaded",
            "short",
            "Tokens per second that engines loaded and did not compute. Each rank and each range of layers counts.",
            {"{{path}}": "sum by (path) (rate(@load_tokens_total[RATE]))"},
            is_stacked=True,
        ),
        Panel(
            "Tokens found by model",
            "short",
            "Tokens per second of the blocks that lookups found.",
            {
                "{{model}}": "sum by (model) (rate(@lookup_hit_tokens_total[RATE]) * on (job, instance, layout) "
                "group_left (model) @layout_info)"
            },
            is_stacked=True,
        ),
        Panel(
            "Requests by outcome",
            "reqps",
            "Requests that engines reported. failed_over and breaker_open could not use the store.",
            {"{{outcome}}": "sum by (outcome) (rate(@requests_reported_total[RATE]))"},
            is_stacked=True,
        ),
        Panel(
            "Lookups that ended at a missing block, by reason",
            "short",
            "The reasons are those of `kvctl explain`. never_stored is new text; evicted: a larger tier would have it.",
            {"{{reason}}": "sum by (reason) (rate(@lookup_misses_total[RATE]))"},
            is_stacked=True,
        ),
    ),
    "Is it healthy?": (
        Panel(
            "Daemons by state",
            "short",
            "down: Prometheus cannot scrape it. draining: it refuses saves.",
            {
                "{{state}}": "sum by (state) (@state)",
                "down": 'count(up{job=~"$job", instance=~"$instance"} == 0) or vector(0)',
            },
            kind="stat",
        ),
        Panel(
            "Stalls of the event loop",
            "short",
            "Delays above 20 ms per minute. All calls of a daemon wait so long.",
            {
                "{{instance}}": "60 * (rate(@event_loop_delay_seconds_count[RATE]) - ignoring (le) "
                'rate(@event_loop_delay_seconds_bucket{le="0.02"}[RATE]))'
            },
        ),
        Panel(
            "Failed calls by reason",
            "reqps",
            "docs/errors.md says what to do about each reason.",
            {"{{reason}}": "sum by (reason) (rate(@rpc_errors_total[RATE]))"},
        ),
        Panel(
            "Blocks refused by reason",
            "short",
            "Blocks per second that saves could not store.",
            {"{{reason}}": "sum by (reason) (rate(@save_refused_blocks_total[RATE]))"},
        ),
        Panel(
            "Damage and losses",
            "short",
            "Per hour. Any of the first three is a reason to look at the drive, the memory and the log.",
            {
                "blocks quarantined": "3600 * sum(rate(@quarantined_blocks_total[RATE]))",
                "errors of the operating system": "3600 * sum(rate(@storage_errors_total[RATE]))",
                "loads failed": "3600 * sum(rate(@loads_failed_total[RATE]))",
                "blocks lost before they were written": "3600 * sum(rate(@lost_unwritten_blocks_total[RATE]))",
                "decisions that the policy failed at": "3600 * sum(rate(@policy_failures_total[RATE]))",
            },
        ),
        Panel(
            "Limits in use",
            "percentunit",
            "Of the daemon that is nearest to each limit.",
            {
                "clients": "max(@clients / @clients_max)",
                "sessions": "max(@sessions / @sessions_max)",
                "layouts": "max(@layouts / @layouts_max)",
                "{{kind}} {{path}}": "max by (kind, path) (@transfers_running / @transfers_max)",
                "index of {{tier}}": "max by (tier) (@index_used_bytes / @index_map_bytes)",
            },
        ),
        Panel(
            "Time until the TLS certificate expires",
            "s",
            "Empty without TLS.",
            {"{{instance}}": "@tls_certificate_expires_seconds - time()"},
            kind="stat",
        ),
    ),
    "Where does the time go?": (
        quantiles("Lookup", "lookup_seconds", "", "In the store, without gRPC."),
        quantiles(
            "Load: first layer",
            "load_first_layer_seconds",
            "path, tier",
            "What a load adds to the time to first token, by the slowest tier that the load needs.",
        ),
        quantiles("Load: all layers", "load_seconds", "path, tier", "Until the client has all of it."),
        quantiles("Save", "save_seconds", "path, durability", "With the time in which the client sends or writes."),
        quantiles("Read of blocks into DRAM", "promotion_seconds", "reason", "By what the blocks are for."),
    ),
    "Space and movement": (
        Panel(
            "Tiers",
            "bytes",
            "A full tier is normal: it evicts. A capacity below the configured one is not; nor much only in DRAM.",
            {
                "{{tier}} used": "sum by (tier) (@tier_used_bytes)",
                "{{tier}} capacity": "sum by (tier) (@tier_capacity_bytes)",
                "{{tier}} configured": "sum by (tier) (@tier_configured_bytes)",
                "only in dram": "sum(@unwritten_bytes)",
            },
        ),
        Panel(
            "Queues",
            "short",
            "Blocks that wait for a write to a tier, or for a read into DRAM.",
            {
                "writes to {{tier}}": "sum by (tier) (@write_queue_blocks)",
                "reads": "sum(@promoting_blocks)",
            },
        ),
        Panel(
            "Bytes of loads and saves",
            "Bps",
            "In place: what clients may read in shared memory.",
            {
                "loads {{path}}": "sum by (path) (rate(@load_bytes_total[RATE]))",
                "saves": "sum(rate(@save_bytes_total[RATE]))",
                "sent from a slower tier": "sum(rate(@read_through_bytes_total[RATE]))",
            },
        ),
        Panel(
            "Bytes of the tiers below DRAM",
            "Bps",
            "Blocks only, without the index.",
            {
                "{{tier}} read": "sum by (tier) (rate(@tier_read_bytes_total[RATE]))",
                "{{tier}} written": "sum by (tier) (rate(@tier_written_bytes_total[RATE]))",
            },
        ),
        Panel(
            "Wear: a tier's capacity written per day",
            "short",
            "Of the tier, not of the drive: multiply by the tier's share of the drive, and compare with its rating.",
            {
                "{{tier}} {{instance}}": "increase(@tier_written_bytes_total[1d]) / "
                "on (job, instance, tier) @tier_capacity_bytes"
            },
        ),
        Panel(
            "Evictions",
            "short",
            "Copies per second, by tier and by what got their space.",
            {"{{tier}} {{reason}}": "sum by (tier, reason) (rate(@evicted_blocks_total[RATE]))"},
        ),
        Panel(
            "Copies between tiers",
            "Bps",
            "read ahead is a part of those to DRAM, and so is what hints prepare.",
            {
                "to DRAM": "sum(rate(@promoted_bytes_total[RATE]))",
                "read ahead": "sum(rate(@read_ahead_bytes_total[RATE]))",
                "for hints": "sum(rate(@hint_promoted_bytes_total[RATE]))",
                "to a slower tier": "sum(rate(@written_behind_bytes_total[RATE]))",
            },
        ),
        Panel(
            "Read ahead",
            "short",
            "Blocks per second. Many unused ones: choose another policy.",
            {
                "read ahead": "sum(rate(@read_ahead_blocks_total[RATE]))",
                "left DRAM unused": "sum(rate(@read_ahead_unused_blocks_total[RATE]))",
            },
        ),
    ),
    "The bulk port: KV bytes between hosts": (
        Panel(
            "Bytes on the bulk port",
            "Bps",
            "Sent to clients and received from them. Compare it with the network's bandwidth. Nothing here while "
            "loads run by `stream`: clients do not reach the port.",
            {"{{direction}}": "sum by (direction) (rate(@bulk_socket_bytes_total[RATE]))"},
        ),
        Panel(
            "Transfers and refusals of the bulk port",
            "short",
            "Loads and saves that ended, by their result, and connections and tickets that were refused, per second.",
            {
                "{{kind}} {{result}}": "sum by (kind, result) (rate(@bulk_transfers_total[RATE]))",
                "refused: {{reason}}": "sum by (reason) (rate(@bulk_refusals_total[RATE]))",
            },
        ),
        Panel(
            "Connections of the bulk port",
            "short",
            "Open connections of each daemon. At server.bulk_connections_max new ones are refused.",
            {"{{instance}}": "@bulk_connections"},
        ),
    ),
    "Clients, models and policy": (
        Panel(
            "Clients, leases, sessions",
            "short",
            "Queued requests are those in the queues that engines sent.",
            {
                "clients": "sum(@clients)",
                "leases": "sum(@leases)",
                "sessions": "sum(@sessions)",
                "queued requests": "sum(@queued_requests)",
            },
        ),
        Panel(
            "Objects by model",
            "short",
            "Stored objects.",
            {
                "{{model}}": "sum by (model) (@layout_blocks * on (job, instance, layout) "
                "group_left (model) @layout_info)"
            },
            is_stacked=True,
        ),
        Panel(
            "Pinned, and set aside",
            "bytes",
            "Set aside: a client whose connection has ended may still write there.",
            {"pinned": "sum(@pinned_bytes)", "set aside": "sum(@set_aside_bytes)"},
        ),
        Panel(
            "Hints",
            "short",
            "Per second.",
            {
                "received": "sum(rate(@hints_received_total[RATE]))",
                "ignored: {{reason}}": "sum by (reason) (rate(@hints_ignored_total[RATE]))",
            },
        ),
        Panel(
            "Placement policy",
            "short",
            "Daemons by the policy that decides.",
            {"{{policy}}": "count by (policy) (@policy_info)"},
        ),
    ),
}


def dashboard() -> dict[str, Any]:
    """Grafana's classic model of a dashboard."""
    panels: list[dict[str, Any]] = []
    ids, top = count(1), 0
    for title, members in SECTIONS.items():
        where = {"x": 0, "y": top, "w": _PANEL_WIDTH * _PANELS_A_LINE, "h": 1}
        panels.append({"id": next(ids), "type": "row", "title": title, "gridPos": where, "panels": []})
        top += 1
        for position, panel in enumerate(members):
            line, column = divmod(position, _PANELS_A_LINE)
            panels.append(_panel(panel, next(ids), column * _PANEL_WIDTH, top + line * _PANEL_HEIGHT))
        top += -(-len(members) // _PANELS_A_LINE) * _PANEL_HEIGHT
    variables = [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        _variable("job", f"label_values({PREFIX}build_info, job)"),
        _variable("instance", f'label_values({PREFIX}build_info{{job=~"$job"}}, instance)'),
    ]
    return {
        "uid": "kvservice",
        "title": "KVService",
        "description": "Generated by `make docs` from tools/generate_monitoring.py.",
        "tags": ["kvservice"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": variables},
        "panels": panels,
    }


def _panel(panel: Panel, id_: int, x: int, y: int) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit}
    options: dict[str, Any] = {}
    if panel.kind == "timeseries":
        defaults["min"] = 0
        defaults["custom"] = {"fillOpacity": 10, "showPoints": "never"}
        if panel.is_stacked:
            defaults["custom"] |= {"fillOpacity": 40, "stacking": {"mode": "normal", "group": "A"}}
        options = {"tooltip": {"mode": "multi", "sort": "desc"}}
    return {
        "id": id_,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": _PANEL_WIDTH, "h": _PANEL_HEIGHT},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {"refId": letter, "datasource": _DATASOURCE, "expr": expanded(query), "legendFormat": legend}
            for letter, (legend, query) in zip(ascii_uppercase, panel.queries.items(), strict=False)
        ],
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": _DATASOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"text": "All", "value": "$__all"},
    }


def operator_rules() -> str:
    """The alerts as an object of the Prometheus Operator."""
    head = """\
# Generated from ops/alerts/kvservice.rules.yaml by `make docs`.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: kvservice
spec:
"""
    return head + textwrap.indent((OPS / RULES).read_text(encoding="utf-8"), "  ")


def generate(into: Path) -> None:
    for path, text in {DASHBOARD: json.dumps(dashboard(), indent=2) + "\n", OPERATOR_RULES: operator_rules()}.items():
        (into / path).parent.mkdir(parents=True, exist_ok=True)
        (into / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", nargs="?", type=Path, default=OPS)
    generate(arguments.parse_args().folder)
