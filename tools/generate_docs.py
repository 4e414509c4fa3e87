"""Writes the reference pages that are derived from the code: `python tools/generate_docs.py [FOLDER]`.

Run by `make docs`, and by the test that compares `docs/` with its output.
"""

from __future__ import annotations

import argparse
import re
from itertools import groupby
from pathlib import Path

from kvservice.config_sources import SETTINGS, Setting, default_text, environment_name
from kvservice.metrics.rows import PREFIX, Metric
from kvservice.metrics.table import SUBJECTS
from kvservice_adapter.engine.metrics import ENGINE_METRICS, EngineMetric
from kvservice_adapter.engine.metrics import PREFIX as ENGINE_PREFIX
from kvservice_api import errors
from kvservice_api.layout import LayerGroup
from tools.python_reference import python_page

DOCS = Path(__file__).resolve().parent.parent / "docs"

CONFIGURATION_HEAD = """\
# Configuration

<!-- Generated from kvservice/config_sections.py by `make docs`. -->

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

The names follow Prometheus' conventions: base units, `_total` for counters, which count from the daemon's start.
Counters and histograms start at 0, also those with labels, so that `rate` and `increase` see the first event. Three
have more series later: `rpc_calls_total` for codes other than `OK`, `rpc_errors_total` for reasons other than
`INTERNAL` and `OVERLOADED`, and `save_refused_blocks_total` for rare reasons. A histogram has `_bucket`, `_sum` and
`_count`; its buckets are from 0.1 ms to 30 s, or from 1 ms for the event loop.

The label `layout` has the first digits of a layout's fingerprint: `kvservice_layout_info` names its model. `path` is
the way of the bytes: `stream` (gRPC), `bulk` (the bulk port), `in_place` (the client reads or writes shared memory) or
`cuda_ipc` (the daemon copies to and from the engine's GPU memory). The client and `kvctl` call the same ways by their
transports: `grpc`, `bulk`, `shm` and `cuda_ipc`.

The daemon also has the metrics of its process, as every program with the Python client of Prometheus: `process_*`,
`python_*`. `kvctl status` shows totals under shorter names of its own.
"""

SIZING_HEAD = """\
# Sizing by hand

<!-- Generated from tools/generate_docs.py by `make docs`. -->

How much DRAM and SSD a number of conversations takes. The results are values for `dram.capacity_bytes` and
`ssd.capacity_bytes` ([configuration](configuration.md)). `kvctl plan` and `kvctl simulate` say more, from a trace of
your own load ([traces](traces.md#recording-a-live-daemon)) or from a generated one ([policies](policies.md)).

## Bytes per token

A model with attention heads stores `2 x layers x KV heads x head dim x bytes per element` for each token. A model with
latent attention (MLA) stores `layers x (kv_lora_rank + qk_rope_head_dim) x bytes per element`. All of these numbers are
in the model's `config.json`. This table is for elements of 2 bytes (bfloat16, float16); with 8-bit KV it is half:

| Model | Layers | KV heads x head dim | Per token | Per block of 256 | Per 8,000 tokens | Histories of 8,000 in 1 TiB |
|---|---|---|---|---|---|---|
"""

SIZING_TAIL = """
Layers with a sliding window count in full: every token of them is stored. Each tensor-parallel rank stores its own KV
heads, so the sum is the same. Where ranks share a KV head or latent vectors, one of them stores it.

## Tiers

* **SSD** holds every conversation that should be found again: `conversations x tokens of each x bytes per token`.
  Those that share a system prompt store its blocks once. {users} users of {model} with histories of {tokens:,} tokens:
  {ssd}.
* **DRAM** holds what runs now, and what returns soon. At least
  `requests in progress x tokens of each x bytes per token`; then the conversations whose next turn is expected within
  minutes. A hit on SSD is read to DRAM first: a history of {tokens:,} tokens of this model takes {read_s:.2f} s at
  {drive:g} GB/s, and the model starts with the first layer.
* Add 1/64 of each tier for its index, at least 4 MiB and at most 1 GiB. `kvctl status` shows the sizes that remain for
  blocks. Beside the DRAM tier the daemon needs memory of its own: [the formula](container.md#memory).

## Wear

Each new token is written to SSD once: `turns per day x (new tokens + answer tokens) x bytes per token`. {turns:,} turns
per day with {new:,} new tokens of {model} write {day}. A drive that its maker rates for {tbw:,} TB written lasts
{years:.1f} years at that rate. `kvservice_tier_written_bytes_total{{tier="ssd"}}` counts what the daemon writes;
[an alert](../ops/runbooks/KVServiceDriveWear.md) watches it. To write
less, keep conversations in DRAM only (`ssd.capacity_bytes=0` in a new store), or store 8-bit KV: with the client
library, because the connectors do not support it yet.
"""

_SIZED = {  # Layers, KV heads, head dim of K, of V; from the models' config.json.
    "Llama-3.1-8B": LayerGroup(32, 8, 128, 128, "bfloat16"),
    "Llama-3.1-70B": LayerGroup(80, 8, 128, 128, "bfloat16"),
    "Qwen2.5-7B": LayerGroup(28, 4, 128, 128, "bfloat16"),
    "Qwen3-235B-A22B": LayerGroup(94, 4, 128, 128, "bfloat16"),
    "Mixtral-8x7B": LayerGroup(32, 8, 128, 128, "bfloat16"),
    "GLM-4.5": LayerGroup(92, 8, 128, 128, "bfloat16"),
    "Gemma-3-27B": LayerGroup(62, 16, 128, 128, "bfloat16"),
    "gpt-oss-120b": LayerGroup(36, 8, 64, 64, "bfloat16"),
    "DeepSeek-V3 and R1": LayerGroup(61, 1, 576, 0, "bfloat16"),  # 512 + 64.
}

ENGINE_HEAD = f"""
## The engine's side

The adapter measures what loads do for an engine. With vLLM these are among vLLM's own metrics, as `vllm:kvservice_NAME`
with vLLM's labels: vLLM collects them from all its processes. The connector for transformers exports them by the
default registry of prometheus_client in the engine's process, as `{ENGINE_PREFIX}NAME` with the label `model`; without
that package it exports none. Counters end in `_total`.

| NAME | Type | Meaning | Engines |
|---|---|---|---|
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
        meaning = (kind.__doc__ or "").partition("\n\n")[0]  # The rest is for callers in Python.
        rows.append(f"| {kind.reason} | {code} | {meaning} | {recovery} |\n")
    return ERRORS_HEAD + "".join(rows)


def metrics_page() -> str:
    parts = [METRICS_HEAD]
    for subject, metrics in SUBJECTS.items():
        parts.append(f"\n## {subject}\n\n| Metric | Type | Meaning | What to do with it |\n|---|---|---|---|\n")
        parts += map(_metric_row, metrics)
    parts += [ENGINE_HEAD, *map(_engine_row, ENGINE_METRICS)]
    return "".join(parts)


def _engine_row(metric: EngineMetric) -> str:
    label = f"<br>by `{metric.label}`" if metric.label else ""
    name = f"{metric.name}_total" if metric.kind == "counter" else metric.name
    return f"| `{name}`{label} | {metric.kind} | {metric.meaning} | {'vLLM' if metric.only_vllm else 'both'} |\n"


def _metric_row(metric: Metric) -> str:
    labels = f"<br>by {', '.join(f'`{label}`' for label in metric.labels)}" if metric.labels else ""
    return f"| `{PREFIX}{metric.name}`{labels} | {metric.kind} | {metric.meaning} | {metric.use} |\n"


def sizing_page() -> str:
    tokens, model = 8000, "Llama-3.1-8B"
    per_token = {name: group.layers * group.slice_bytes(group.kv_heads, 1) for name, group in _SIZED.items()}
    rows = [
        f"| {name} | {group.layers} | {_heads(group)} | {_size(per_token[name])} | {_size(256 * per_token[name])} | "
        f"{_size(tokens * per_token[name])} | {2**40 // (tokens * per_token[name]):,} |\n"
        for name, group in _SIZED.items()
    ]
    users, drive, turns, new, tbw = 1000, 3.0, 20_000, 700, 7000
    day_bytes = turns * new * per_token[model]
    tail = SIZING_TAIL.format(
        model=model, users=f"{users:,}", tokens=tokens, ssd=_size(users * tokens * per_token[model]),
        read_s=tokens * per_token[model] / (drive * 1e9), drive=drive, turns=turns, new=new, day=_size(day_bytes),
        tbw=tbw, years=tbw * 1e12 / (day_bytes * 365),
    )  # fmt: skip
    return SIZING_HEAD + "".join(rows) + tail


def _heads(group: LayerGroup) -> str:
    return f"{group.kv_heads} x {group.k_head_dim}" if group.v_head_dim else f"latent, {group.k_head_dim}"


def _size(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.4g} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.3g} TiB"


def error_table() -> list[tuple[str, str, str]]:
    """Class, code and recovery, as the docstring of errors.py draws them."""
    assert errors.__doc__
    return _TABLE_ROW.findall(errors.__doc__)


def generate(into: Path) -> None:
    (into / "configuration.md").write_text(configuration_page(), encoding="utf-8")
    (into / "errors.md").write_text(errors_page(), encoding="utf-8")
    (into / "reference").mkdir(exist_ok=True)
    (into / "reference" / "metrics.md").write_text(metrics_page(), encoding="utf-8")
    (into / "reference" / "python.md").write_text(python_page(), encoding="utf-8")
    (into / "sizing.md").write_text(sizing_page(), encoding="utf-8")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", nargs="?", type=Path, default=DOCS)
    generate(arguments.parse_args().folder)
