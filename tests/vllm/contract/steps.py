"""vLLM's real scheduler and KV cache manager, step by step, over a worker with numbers for a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any, Self

from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash, resolve_kv_cache_block_sizes
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds, KVConnectorOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.daemon import until
from tests.vllm.contract.numbers import VOCABULARY
from tests.vllm.contract.setup import Setup, attention_layers, kv_cache_config
from tests.vllm.contract.worker import Runner, Worker

_STEPS_MAX = 20_000  # A request that waits for a load takes a step each time that the engine asks.
_WAIT_S = 60.0

init_none_hash(sha256)


class Steps:
    """An engine's core without its processes: add requests, and take steps. A context manager.

    Every step checks that what the forward read was right, except for the pages that the connector reported as bad in
    that step.
    """

    def __init__(self, setup: Setup, runner: Runner = Runner.V1) -> None:
        self.setup = setup
        self._config = setup.vllm_config()
        caches = kv_cache_config(self._config, attention_layers(setup.vllm_config(), setup.model))
        step_tokens, hashed_tokens = resolve_kv_cache_block_sizes(caches, self._config)
        self.scheduler = (AsyncScheduler if setup.is_asynchronous else Scheduler)(
            vllm_config=self._config,
            kv_cache_config=caches,
            log_stats=True,
            structured_output_manager=StructuredOutputManager(self._config),
            block_size=step_tokens,
            hash_block_size=hashed_tokens,
        )
        self.scheduler.use_v2_model_runner = runner is Runner.V2
        self.worker = Worker(self._config, caches, setup.model, runner)
        self.requests: dict[str, Request] = {}  # All so far, with what they have generated.
        self.hits: dict[str, int] = {}  # Tokens that came from the connector, as vLLM reports them with a first token.
        self.own_hits: dict[str, int] = {}  # Tokens that came from vLLM's own prefix cache.
        self.orders: Any = None  # What the scheduler's connector gave the worker's in the last step.
        self._in_flight: tuple[Any, Any] = None, None  # The last step and its output, until the next is scheduled.
        self.transfer_stats: list[dict[str, Any]] = []  # What vLLM's exporter gets of the connector's counts.
        self.bad_pages: list[int] = []  # That the connector reported so far.
        self._hasher = get_request_block_hasher(hashed_tokens, sha256)
        self._ids = (f"request-{number}" for number in count())

    def __enter__(self) -> Self:
        ours = getattr(self.scheduler.connector, "_scheduler", None)
        if ours is not None:  # Before the daemon has answered, requests are neither looked up nor saved.
            until(lambda: ours.is_ready)
        return self

    def __exit__(self, *exc: object) -> None:
        self.worker.close()
        self.scheduler.shutdown()

    def add(
        self,
        prompt: Sequence[int],
        generate: int = 1,
        *,
        given: Mapping[str, Any] | None = None,
        hints: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> str:
        """A request that ends after so many tokens. Returns its id. `given` are the connector's parameters of the
        request, `hints` what its application knows, and `options` are of vLLM's Request.
        """
        extra = {"kv_transfer_params": {"kvservice": given, "kv_hints": hints}} if given or hints else None
        parameters = SamplingParams(max_tokens=generate, ignore_eos=True, extra_args=extra)
        request = Request(
            request_id=next(self._ids),
            prompt_token_ids=list(prompt),
            sampling_params=parameters,
            pooling_params=None,
            block_hasher=self._hasher,
            **options,
        )
        self.requests[request.request_id] = request
        self.scheduler.add_request(request)
        return request.request_id

    def step(self, before_work: Callable[[], object] = lambda: None) -> KVConnectorOutput:
        """Schedule, compute, and report back. Returns what the worker's connector reported.

        `before_work` runs between the scheduler's part and the worker's.
        """
        scheduled = self.scheduler.schedule()
        self.orders = scheduled.kv_connector_metadata
        before_work()
        output = self.worker.execute(scheduled)
        if not scheduled.total_num_scheduled_tokens:
            time.sleep(0.001)  # Requests wait for the daemon, which needs the core.
        reported = output.kv_connector_output or KVConnectorOutput()
        self.bad_pages += sorted(reported.invalid_block_ids)
        wrong = {each.request_id: each for each in self.worker.wrong_pages}
        for request_id, page in wrong.items():
            bad = {page.page_id for page in self.worker.wrong_pages if page.request_id == request_id}
            assert bad <= reported.invalid_block_ids, f"not reported as bad: {page}"
        if self.setup.is_asynchronous:
            self._in_flight, (scheduled, output) = (scheduled, output), self._in_flight
        if output is None:
            return reported
        for answered in self.scheduler.update_from_output(scheduled, output).values():
            if (stats := answered.scheduler_stats) is not None and stats.kv_connector_stats:
                self.transfer_stats.append(stats.kv_connector_stats)
            for each in answered.outputs:
                if each.prefill_stats is not None:
                    self.hits[each.request_id] = each.prefill_stats.num_external_cached_tokens
                    self.own_hits[each.request_id] = each.prefill_stats.num_local_cached_tokens
        if self.setup.drafted:
            ids = [each for each in scheduled.num_scheduled_tokens if not self.requests[each].is_finished()]
            self.scheduler.update_draft_token_ids(
                DraftTokenIds(ids, [self._draft(self.requests[each]) for each in ids])
            )
        return reported

    def _draft(self, request: Request) -> list[int]:
        """The next tokens as a draft model would guess them: from right at first to all wrong, in turns."""
        known = len(request.output_token_ids)
        right = self.setup.model.generate(request.prompt_token_ids or (), known + self.setup.drafted)[known:]
        right_count = known % (self.setup.drafted + 1)
        return [*right[:right_count], *((token + 1) % VOCABULARY for token in right[right_count:])]

    def run(self, *request_ids: str) -> None:
        """Take steps until these requests have ended; all that are known if none is named."""
        for request_id in request_ids or tuple(self.requests):
            self.until(self.requests[request_id].is_finished)

    def until(self, condition: Callable[[], bool]) -> None:
        """Take steps until it is true."""
        start_s = time.monotonic()
        for _ in range(_STEPS_MAX):
            if condition():
                return
            assert time.monotonic() - start_s < _WAIT_S, "it did not come about in time"
            self.step()
        raise AssertionError(f"it did not come about in {_STEPS_MAX} steps")

    def ask(self, prompt: Sequence[int], generate: int = 1, **options: Any) -> Request:
        """Add a request, and run it to its end."""
        request_id = self.add(prompt, generate, **options)
        self.run(request_id)
        return self.requests[request_id]

    def settle(self) -> None:
        """Take steps until vLLM has no more to do, so that everything is saved and freed."""
        self.until(lambda: not self.scheduler.has_requests())
        self.step()

    def abort(self, request_id: str) -> None:
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def forget_pages(self) -> None:
        """Empty vLLM's own prefix cache: what is hit afterwards comes from the connector."""
        self.settle()
        assert self.scheduler.reset_prefix_cache()

    def expect(self, request_id: str) -> None:
        """The request generated what it generates without any store."""
        request = self.requests[request_id]
        assert request.status is RequestStatus.FINISHED_LENGTH_CAPPED
        right = self.setup.model.generate(request.prompt_token_ids or (), request.max_tokens)
        assert list(request.output_token_ids) == right

    def expect_nothing_is_held(self) -> None:
        """No request is known to vLLM any more, and each of its pages is free."""
        self.settle()
        scheduler, pool = self.scheduler, self.scheduler.kv_cache_manager.block_pool
        assert not scheduler.requests
        assert not scheduler.running
        assert not len(scheduler.waiting)
        assert not scheduler.finished_recving_kv_req_ids
        assert [block.block_id for block in pool.blocks if block.ref_cnt and not block.is_null] == []
        assert pool.get_num_free_blocks() == self.setup.pages - 1  # Without vLLM's null page.
