"""Writes the reference pages that are derived from the code: `python tools/generate_docs.py [FOLDER]`.

Run by `make docs`, and by the test that compares `docs/` with its output.
"""

from __future__ import annotations

import re
import sys
from itertools import groupby
from pathlib import Path

from kvservice.config_sources import SETTINGS, Setting, default_text, environment_name
from kvservice.metrics.rows import PREFIX, Metric
from kvservice.metrics.table import SUBJECTS
from kvservice_api import errors

DOCS = Path(__file__).resolve().parent.parent / "docs"

CONFIGURATION_HEAD = """\
# Configuration

<!-- Generated from kvservice/config.py by `make docs`. -->

A setting comes from, in this order: a flag of `kvservice serve`, the environment, a TOML file, its default. The file
is named by `--config FILE` or by `KVSERVICE_CONFIG`. The setting `server.address` is written

| Where | How |
|---|---|
| as a flag | `--server.address 127.0.0.1:7070` |
| in the environment | `KVSERVICE_SERVER__ADDRESS=127.0.0.1:7070` |
| in the file | `address = "127.0.0.1:7070"`, below `[server]` |

A name that is no setting is refused, and the nearest one named. Sizes are numbers of bytes or text such as `"4GiB"`
(2^30) and `"4GB"` (10^9). A flag without a value switches a setting on.
"""

ERRORS_HEAD = """\
# Errors

<!-- Generated from proto/kvservice_api/errors.py by `make docs`. -->

A failed call ends with a canonical gRPC status code and a `google.rpc.ErrorInfo` of the domain `kvservice`, whose
reason names the condition. Where waiting helps there is a `google.rpc.RetryInfo` too. In Python each reason is a class
in `kvservice_api.errors`.

| Reason | Code | What has happened | What the caller does next |
|---|---|---|---|
"""

METRICS_HEAD = """\
# Metrics

<!-- Generated from kvservice/metrics by `make docs`. -->

Prometheus reads them at `/metrics` of `server.metrics_address`. Beside them, at `/healthz`, a probe gets 200 and the
daemon's state while the event loop runs; 503 before the daemon serves, or if the loop was silent for 10 seconds. Any
other path is 404.

Names follow Prometheus' conventions: base units, `_total` for counters, which count from the daemon's start. Counters
and histograms start at 0, also those with labels, so that `rate` and `increase` see the first event. Three have more
series later: `rpc_calls_total` for codes other than `OK`, `rpc_errors_total` for reasons other than `INTERNAL` and
`OVERLOADED`, and `save_refused_blocks_total` for rare reasons. A histogram has `_bucket`, `_sum` and `_count`; its
buckets are from 0.1 ms to 30 s, or from 1 ms for the event loop.

The label `layout` has the first digits of a layout's fingerprint: `kvservice_layout_info` names its model. `path` is
`stream` (bytes over gRPC) or `in_place` (the client reads or writes shared memory).

The daemon also has the metrics of its process, as every program with the Python client of Prometheus: `process_*`,
`python_*`. `kvctl status` shows totals under shorter names of its own.
"""

_TABLE_ROW = re.compile(r"^ +x (\w+) +([A-Z_]+) +(.+)$", re.MULTILINE)


def configuration_page() -> str:
    parts = [CONFIGURATION_HEAD]
    for section, settings in groupby(SETTINGS.values(), key=lambda setting: setting.name.partition(".")[0]):
        rows = list(settings)
        parts.append(f"\n## {section}\n\n{rows[0].section.__doc__}\n\n")
        parts.append("| Setting | Default | Unit | What it does |\n|---|---|---|---|\n")
        parts += [_setting_row(row) for row in rows]
    return "".join(parts)


def _setting_row(setting: Setting) -> str:
    default = default_text(setting)
    shown = default if default == "empty" else f"`{default}`"
    names = f"`{setting.name}`<br>`{environment_name(setting.name)}`"
    return f"| {names} | {shown} | {setting.unit} | {setting.description} |\n"


def errors_page() -> str:
    rows = []
    for name, code, recovery in error_table():
        kind = getattr(errors, name)
        rows.append(f"| {kind.reason} | {code} | {kind.__doc__} | {recovery} |\n")
    return ERRORS_HEAD + "".join(rows)


def metrics_page() -> str:
    parts = [METRICS_HEAD]
    for subject, metrics in SUBJECTS.items():
        parts.append(f"\n## {subject}\n\n| Metric | Type | Meaning | What to do with it |\n|---|---|---|---|\n")
        parts += map(_metric_row, metrics)
    return "".join(parts)


def _metric_row(metric: Metric) -> str:
    labels = f"<br>by {', '.join(f'`{label}`' for label in metric.labels)}" if metric.labels else ""
    return f"| `{PREFIX}{metric.name}`{labels} | {metric.kind} | {metric.meaning} | {metric.use} |\n"


def error_table() -> list[tuple[str, str, str]]:
    """Class, code and recovery, as the docstring of errors.py draws them."""
    assert errors.__doc__
    return _TABLE_ROW.findall(errors.__doc__)


def generate(into: Path) -> None:
    (into / "configuration.md").write_text(configuration_page(), encoding="utf-8")
    (into / "errors.md").write_text(errors_page(), encoding="utf-8")
    (into / "reference").mkdir(exist_ok=True)
    (into / "reference" / "metrics.md").write_text(metrics_page(), encoding="utf-8")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS)
