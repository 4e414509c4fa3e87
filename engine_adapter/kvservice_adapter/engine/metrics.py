"""The metrics of an engine's side: their table, what counts into them, and their export by prometheus_client.

The connector for transformers exports them with the engine process' own metrics, by prometheus_client's default
registry, if that package is installed. vLLM collects them from its processes itself: ``connectors/vllm/stats.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from kvservice_adapter.load import LoadFailed
from kvservice_api.cost import Kind, Plan
from kvservice_api.errors import DeadlineExceeded, KVError

PREFIX = "kvservice_adapter_"  # Of the connector for transformers; in vLLM it is ``vllm:kvservice_``.
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

Add = Callable[[str, float, str], None]  # Counts a value into a metric, with the value of its label or "".


class EngineMetric(NamedTuple):
    """`name` is without prefix, and a counter's without ``_total``. `label` is empty if it has none."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    label: str
    meaning: str
    only_vllm: bool = False


ENGINE_METRICS: Sequence[EngineMetric] = (
    EngineMetric(
        "prompt_tokens",
        "counter",
        "source",
        "Tokens of prompts, by where their KV came from: `loaded` by KVService, `engine_cache` (vLLM's own prefix "
        "cache), or `computed`. In a batch of transformers padding counts too.",
    ),
    EngineMetric(
        "saved_seconds",
        "counter",
        "",
        "By how much loads made first tokens earlier: the estimate for computing the whole prompt, less the measured "
        "time. Requests that a load made later count 0: compare the next two.",
    ),
    EngineMetric(
        "planned_seconds",
        "histogram",
        "plan",
        "The time to the first token that was planned, by plan: `load`, `recompute`, `mixed`.",
    ),
    EngineMetric(
        "measured_seconds",
        "histogram",
        "plan",
        "The time to the first token of the requests of `planned_seconds`, as measured: with transformers the waits "
        "and the first forward, with vLLM from the plan on, with its queue.",
    ),
    EngineMetric(
        "load_wait_seconds",
        "histogram",
        "",
        "How long the engine waited for one layer of a load; in vLLM with `whole` for the load.",
    ),
    EngineMetric(
        "failed_loads",
        "counter",
        "reason",
        "Loads that failed, so that their tokens were computed. Reasons are those of [errors](../errors.md), "
        "`BREAKER_OPEN`, or `INTERNAL`.",
    ),
    EngineMetric(
        "dropped_save_blocks",
        "counter",
        "reason",
        "Blocks that an attempt to save them left out. A later attempt may have stored them: the end of a turn saves "
        "what `STAGING_FULL` dropped. Reasons are those of [errors](../errors.md), `STAGING_FULL`, `BREAKER_OPEN`, or "
        "`INTERNAL`.",
    ),
    EngineMetric(
        "open_breakers",
        "gauge",
        "",
        "Circuit breakers that are open: the daemon did not answer, and is not asked. vLLM has one per worker and one "
        "of the scheduler, and reports a change with its next step.",
    ),
    EngineMetric("breaker_openings", "counter", "", "How often a breaker has opened."),
    EngineMetric("lookups", "counter", "", "Requests that were looked up.", only_vllm=True),
    EngineMetric("hits", "counter", "", "Requests of which a prefix is stored.", only_vllm=True),
    EngineMetric(
        "hit_tokens", "counter", "", "Tokens of those prefixes that vLLM did not have itself.", only_vllm=True
    ),
    EngineMetric(
        "computed_hits",
        "counter",
        "",
        "Requests of which a prefix is stored, and was computed because that is faster.",
        only_vllm=True,
    ),
    EngineMetric(
        "late_lookups",
        "counter",
        "",
        "Lookups that the daemon did not answer in time: the request was computed.",
        only_vllm=True,
    ),
    EngineMetric("loads", "counter", "", "Loads that ended with their KV in vLLM's pages.", only_vllm=True),
    EngineMetric("loaded_bytes", "counter", "", "Bytes that were loaded.", only_vllm=True),
    EngineMetric("load_seconds", "counter", "", "Seconds that loads took.", only_vllm=True),
    EngineMetric("saved_blocks", "counter", "", "Blocks that were stored.", only_vllm=True),
    EngineMetric(
        "already_stored_blocks", "counter", "", "Blocks that were to be stored, and were already.", only_vllm=True
    ),
    EngineMetric(
        "errors", "counter", "", "Errors in the connector itself, each of which is logged once.", only_vllm=True
    ),
)


class EngineMetrics:
    """Those of one model, in this process. Does nothing without prometheus_client. Any thread may call it."""

    def __init__(self, model_id: str) -> None:
        self._model_id = model_id
        self._metrics = _registered()
        for metric in ENGINE_METRICS:  # So that they are 0, and not missing, before the first event.
            if metric.name in self._metrics and not metric.label:
                self._metrics[metric.name].labels(model_id)

    def add(self, name: str, value: float = 1.0, label: str = "") -> None:
        metric = self._metrics.get(name)
        if metric is None:
            return
        child = metric.labels(self._model_id, label) if label else metric.labels(self._model_id)
        if hasattr(child, "observe"):
            child.observe(value)
        else:
            child.inc(value)

    def save_dropped(self, reason: str, blocks: int) -> None:
        self.add("dropped_save_blocks", blocks, reason)

    def breaker_changed(self, is_open: bool) -> None:
        self.add("open_breakers", 1.0 if is_open else -1.0)
        if is_open:
            self.add("breaker_openings")


def not_counted(name: str, value: float, label: str) -> None:
    """An `Add` of those who export nothing."""


def count_first_token(
    add: Add, plan: Plan | None, measured_s: float, *, loaded: int, computed: int, engine_cache: int = 0
) -> None:
    """A request has its first token: numbers of its prompt's tokens, and how long that took from the plan on."""
    for source, tokens in (("loaded", loaded), ("engine_cache", engine_cache), ("computed", computed)):
        if tokens > 0:
            add("prompt_tokens", tokens, source)
    planned_s = plan.estimate_s.get(plan.kind) if plan is not None else None
    if plan is None or planned_s is None:
        return
    add("planned_seconds", planned_s, plan.kind.value)
    add("measured_seconds", measured_s, plan.kind.value)
    recompute_s = plan.estimate_s.get(Kind.RECOMPUTE)
    if plan.kind is not Kind.RECOMPUTE and recompute_s is not None:
        add("saved_seconds", max(0.0, recompute_s - measured_s), "")


def reason_of(error: BaseException) -> str:
    """The value of the label `reason`."""
    if isinstance(error, LoadFailed):
        return DeadlineExceeded.reason if error.__cause__ is None else reason_of(error.__cause__)
    return error.reason if isinstance(error, KVError) else "INTERNAL"


@functools.cache
def _registered() -> Mapping[str, Any]:
    """The metrics by name, in the default registry. Empty without prometheus_client."""
    try:
        from prometheus_client import Counter, Gauge, Histogram
    except ImportError:
        return {}
    made: dict[str, Any] = {}
    for metric in (each for each in ENGINE_METRICS if not each.only_vllm):
        labels = ["model", metric.label] if metric.label else ["model"]
        name, meaning = PREFIX + metric.name, metric.meaning.replace("`", "")
        if metric.kind == "counter":
            made[metric.name] = Counter(name, meaning, labels)
        elif metric.kind == "gauge":
            made[metric.name] = Gauge(name, meaning, labels, multiprocess_mode="livesum")
        else:
            made[metric.name] = Histogram(name, meaning, labels, buckets=BUCKETS_S)
    return made
