"""The options of ``kvctl simulate`` and ``kvctl plan``: the load and the machine. Impossible values are refused."""

from __future__ import annotations

import functools
import inspect
import math
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from kvservice.simulate import generate, traces
from kvservice.simulate.engine import CONTENDERS
from kvservice.simulate.generated_hints import with_typing_hints
from kvservice.simulate.policies import FORMER_NAMES
from kvservice.simulate.settings import GIB, MIB, Machine
from kvservice.simulate.think_times import SHAPES
from kvservice.simulate.ticks import spread, tick_of
from kvservice.simulate.workload import Workload

NumberT = TypeVar("NumberT", int, float)
NameT = TypeVar("NameT", bound=str)


def fail(reason: str) -> NoReturn:
    """Print one line to stderr and end with exit code 1."""
    print(f"kvctl: {reason}", file=sys.stderr)
    raise typer.Exit(1)


def number(
    flag: str, text: str, panel: str | None = None, *, least: float = 0.0, most: float = 1e12, above: bool = False,
    below: bool = False, **how: Any,
) -> Any:  # fmt: skip
    """An option for one number from `least` to `most`. `above` and `below` exclude the ends themselves."""

    def check(value: NumberT | None) -> NumberT | None:
        if value is None:
            return None
        low, high = f"{'above' if above else 'at least'} {least:g}", f"{'below' if below else 'at most'} {most:g}"
        if not math.isfinite(value):
            raise typer.BadParameter(f"{value} is not a finite number; it must be {low}")
        if value < least or (above and value == least):
            raise typer.BadParameter(f"{value:g} is too small; it must be {low}")
        if value > most or (below and value == most):
            raise typer.BadParameter(f"{value:g} is too large; it must be {high}")
        return value

    return typer.Option(flag, help=text, rich_help_panel=panel, callback=check, **how)


def policies(text: str) -> list[str]:
    """Names from text such as ``lru,foresight``. Refuses unknown and repeated names."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name in FORMER_NAMES:
            raise typer.BadParameter(f"{name!r} is called {FORMER_NAMES[name]} now", param_hint="--policy")
        _one_of(name, CONTENDERS, "policy", "--policy")
        if names.count(name) > 1:
            raise typer.BadParameter(f"{name!r} is given more than once", param_hint="--policy")
    return names


def _one_of(name: str, known: Sequence[NameT], kind: str, flag: str) -> NameT:
    if name in known:
        return known[known.index(name)]
    raise typer.BadParameter(f"no {kind} is called {name!r}; choose from {', '.join(known)}", param_hint=flag)


def _refuse_given(options: object, names: Iterable[str], reason: str) -> None:
    """Refuse options that were given, named as the fields of a group."""
    for name in names:
        if getattr(options, name) is not None:
            raise typer.BadParameter(reason, param_hint=f"--{name.replace('_', '-')}")


def span(text: str, flag: str) -> tuple[float, float]:
    """Two numbers of seconds from text such as ``2:5``."""

    def refuse(reason: str) -> NoReturn:
        raise typer.BadParameter(f"{text!r} {reason}", param_hint=flag)

    first, colon, last = text.partition(":")
    try:
        low, high = float(first), float(last)
    except ValueError:
        colon = ""
    if not colon:
        refuse("is not of the form A:B, such as 2:5")
    if not (math.isfinite(low) and math.isfinite(high)):
        refuse("has an end that is not a finite number")
    if low < 0:
        refuse("begins below 0")
    if low > high:
        refuse("ends before it begins")
    return low, high


def with_options(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with one option per field of each parameter that is a dataclass, in the parameter's place."""
    parameters = inspect.signature(verb, eval_str=True).parameters.values()
    groups: dict[str, Any] = {each.name: each.annotation for each in parameters if is_dataclass(each.annotation)}

    @functools.wraps(verb)
    def run(**arguments: Any) -> None:
        for name, group in groups.items():
            arguments[name] = group(**{field: arguments.pop(field) for field in group.__dataclass_fields__})
        verb(**arguments)

    shown: list[inspect.Parameter] = []
    for each in parameters:
        shown += _options_of(each.annotation) if each.name in groups else [each.replace(kind=each.KEYWORD_ONLY)]
    # Typer reads a verb's options from `__signature__`, which function types do not declare.
    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    return run


def _options_of(group: Any) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(group, include_extras=True)
    parameters = inspect.signature(group).parameters.values()
    return [each.replace(kind=each.KEYWORD_ONLY, annotation=hints[each.name]) for each in parameters]


GENERATORS = ("sharegpt", "people")

_SIZE_MAX_GB = 1e9  # One exabyte: sums of bytes fit into 64 bits.
_KV_BYTES_PER_TOKEN = round(0.78125 * MIB)
_LOAD, _MACHINE, _GPU = "The load", "The machine", "The GPU's model, in place of --service-turns-per-s"


@dataclass(frozen=True)
class LoadOptions:
    """A trace file, or a generator and its parameters. None means that the option was not given."""

    trace: Annotated[
        str,
        typer.Option(
            metavar="FILE|sharegpt|people",
            help="A trace file, or a folder of agents' sessions (docs/traces.md). Or generated load: conversations as"
            " in ShareGPT, or the users of a real service.",
        ),
    ]
    format: Annotated[str, typer.Option(help=f"The file's format: {', '.join(traces.FORMATS)}.")] = "auto"
    warmup_turns: Annotated[int, number("--warmup-turns", "Turns that run before the measurement starts.")] = 0
    seed: Annotated[
        int, number("--seed", "Seed of the generated load and hints, and of what a file leaves open.", _LOAD)
    ] = 0
    sessions: Annotated[
        int | None,
        number("--sessions", "Number of sessions.", _LOAD, least=1, most=1e7, show_default="9000; people: 2000"),
    ] = None
    session_rate: Annotated[
        float | None,
        number(
            "--session-rate", "New sessions per second.", _LOAD, above=True, show_default="1; people: 0.2; weka: 1/60"
        ),
    ] = None
    think_s: Annotated[
        float | None,
        number(
            "--think-s",
            "Mean time from an answer to the next request.",
            _LOAD,
            most=1e9,
            show_default="30; people: as at the service",
        ),
    ] = None
    think_shape: Annotated[
        str | None,
        typer.Option(
            help=f"Distribution of the think times: {', '.join(SHAPES)}.",
            rich_help_panel=_LOAD,
            show_default="people",
        ),
    ] = None
    start_tokens: Annotated[
        float | None,
        number(
            "--start-tokens",
            "People: mean tokens of a first request besides its query: a persona, documents.",
            _LOAD,
            most=1e6,
            show_default="45",
        ),
    ] = None
    answer_share: Annotated[
        float | None,
        number(
            "--answer-share",
            "People: how much of the variance in the order of think times the answer before them explains; 0: nothing,"
            " and all users are alike.",
            _LOAD,
            most=0.88,
            show_default="0.62",
        ),
    ] = None
    context: Annotated[
        int | None,
        number(
            "--context",
            "The model's window in tokens; 0: no limit.",
            _LOAD,
            most=1e9,
            show_default="4096; people, files: no limit",
        ),
    ] = None
    typing_lead_s: Annotated[
        str | None,
        typer.Option(
            metavar="A:B",
            help="Hints: a client reports that its user types, A to B seconds before the request.",
            rich_help_panel=_LOAD,
        ),
    ] = None
    false_hints: Annotated[
        float, number("--false-hints", "The share of hints that are wrong.", _LOAD, most=1, below=True)
    ] = 0.0
    block_tokens: Annotated[
        int | None,
        number(
            "--block-tokens",
            f"Tokens per block of a file of {', '.join(traces.WITH_BLOCKS)}.",
            _LOAD,
            least=1,
            most=2**20,
            show_default="512; bailian: 16",
        ),
    ] = None
    spread_ticks: Annotated[
        bool | None,
        typer.Option(
            "--spread-ticks/--keep-ticks",
            help="Where a file's clock ticks in whole seconds, spread the requests of a tick evenly over it.",
            rich_help_panel=_LOAD,
            show_default="spread",
        ),
    ] = None

    def workload(self) -> Workload:
        """The turns. Ends the program if the trace is not usable, and refuses contradictory options."""
        if self.false_hints and self.typing_lead_s is None:
            raise typer.BadParameter(
                "is the share of wrong hints: give --typing-lead-s too", param_hint="--false-hints"
            )
        lead_s = None if self.typing_lead_s is None else span(self.typing_lead_s, "--typing-lead-s")
        workload = self._generated(lead_s) if self.trace in GENERATORS else self._read(lead_s)
        if self.warmup_turns >= workload.turns:
            left = f"{self.warmup_turns} leaves nothing to measure: the load has {workload.turns} turns"
            raise typer.BadParameter(left, param_hint="--warmup-turns")
        return workload

    def _generated(self, lead_s: tuple[float, float] | None) -> Workload:
        if self.format != "auto":
            raise typer.BadParameter(f"is for files; {self.trace} is generated", param_hint="--format")
        _refuse_given(self, ("block_tokens", "spread_ticks"), f"is for files; {self.trace} is generated")
        shape = _one_of(self.think_shape or "people", SHAPES, "shape", "--think-shape")
        people = ("start_tokens", "answer_share")
        if self.trace == "people":
            return generate.people(
                users=self.sessions or 2000,
                user_rate=self.session_rate or 0.2,
                think_s=self.think_s,
                shape=shape,
                context_tokens=self.context or 0,
                **{name: getattr(self, name) for name in people if getattr(self, name) is not None},
                typing_lead_s=lead_s,
                false_hints=self.false_hints,
                seed=self.seed,
            )
        _refuse_given(self, people, f"is for people, not for {self.trace}")
        return generate.sharegpt(
            sessions=self.sessions or 9000,
            session_rate=self.session_rate or 1.0,
            think_s=30.0 if self.think_s is None else self.think_s,
            shape=shape,
            context_tokens=4096 if self.context is None else self.context,
            typing_lead_s=lead_s,
            false_hints=self.false_hints,
            seed=self.seed,
        )

    def _read(self, lead_s: tuple[float, float] | None) -> Workload:
        generated = f"is for generated load; {self.trace} is a file"
        _refuse_given(self, ("sessions", "think_s", "think_shape", "start_tokens", "answer_share"), generated)
        _one_of(self.format, traces.FORMATS, "format", "--format")
        try:
            form = traces.format_of(self.trace) if self.format == "auto" else self.format
            if form not in traces.WITHOUT_CLOCK:
                _refuse_given(self, ("session_rate",), generated)
            if form not in traces.WITH_BLOCKS:
                _refuse_given(self, ("block_tokens",), f"is for {', '.join(traces.WITH_BLOCKS)}; the file is {form}")
            workload = traces.read(
                self.trace, form, block_tokens=self.block_tokens, session_rate=self.session_rate, seed=self.seed
            )
        except traces.TraceError as error:
            fail(f"--trace: {error}")
        workload = self._spread(workload)
        if self.context is not None:
            workload = replace(workload, context_tokens=self.context)
        if lead_s is not None:
            try:
                workload = with_typing_hints(workload, lead_s, self.false_hints, self.seed)
            except ValueError as error:
                raise typer.BadParameter(str(error), param_hint="--typing-lead-s") from None
        return workload

    def _spread(self, workload: Workload) -> Workload:
        tick = tick_of(workload)
        if tick is None:
            return workload
        shared = f"The file's clock ticks in {tick.seconds} s, and up to {tick.most:,} requests share a tick: they "
        if self.spread_ticks is False:
            return replace(workload, notes=(*workload.notes, f"{shared}arrive together (--keep-ticks)."))
        spread_out = spread(workload, tick, self.seed)
        return replace(spread_out, notes=(*workload.notes, f"{shared}are spread over it (--keep-ticks keeps them)."))


@dataclass(frozen=True)
class RateOptions:
    """The machine, except for the sizes of its tiers."""

    ssd_gbps: Annotated[
        float, number("--ssd-gbps", "SSD bandwidth in GiB/s, reads and writes together.", _MACHINE, above=True)
    ] = 5.0
    kv_mb_per_token: Annotated[
        float | None,
        number(
            "--kv-mb-per-token",
            "MiB of KV per token: 0.78125 for 13B, 2.5 for 65B.",
            _MACHINE,
            most=1e5,
            show_default="0.78125; recorded: as it was",
        ),
    ] = None
    link_gbps: Annotated[
        float, number("--link-gbps", "Bandwidth from DRAM to the GPU in GiB/s.", _MACHINE, above=True)
    ] = 24.2
    service_turns_per_s: Annotated[
        float | None,
        number(
            "--service-turns-per-s",
            "A server that starts this many turns per second.",
            _MACHINE,
            above=True,
            show_default="the GPU's model",
        ),
    ] = None
    prefill_tokens_per_s: Annotated[
        float, number("--prefill-tokens-per-s", "Prompt tokens that the GPU computes per second.", _MACHINE, above=True)
    ] = 8000.0
    gpus: Annotated[int, number("--gpus", "GPUs of the machine, for its cost.", _MACHINE, least=1, most=1e6)] = 1
    blocking_loads: Annotated[
        bool,
        typer.Option(
            "--blocking-loads",
            help="The GPU waits for the KV of the request that it has started, in place of running others meanwhile.",
            rich_help_panel=_MACHINE,
        ),
    ] = False
    always_load: Annotated[
        bool,
        typer.Option(
            "--always-load",
            help="Read what SSD has, also where computing it again takes less time.",
            rich_help_panel=_MACHINE,
        ),
    ] = False
    unreported_answers: Annotated[
        bool,
        typer.Option(
            "--unreported-answers",
            help="No engine reports how long an answer was: policies know what later requests add to a history.",
            rich_help_panel=_MACHINE,
        ),
    ] = False
    overflow_drops: Annotated[
        bool,
        typer.Option(
            "--overflow-drops",
            help="Stored keys contain positions: a conversation that exceeds the window loses its KV.",
            rich_help_panel=_MACHINE,
        ),
    ] = False
    session_ttl_s: Annotated[
        float | None,
        number(
            "--session-ttl-s", "A session ends when it is idle for longer.", _MACHINE, above=True, show_default="never"
        ),
    ] = None
    decode_tokens_per_s: Annotated[
        float | None,
        number("--decode-tokens-per-s", "Per sequence in a batch.", _GPU, above=True, show_default="25"),
    ] = None
    batch: Annotated[
        int | None, number("--batch", "Sequences that decode together.", _GPU, least=1, most=1e6, show_default="24")
    ] = None

    def machine(self, dram_gb: float, ssd_gb: float, kv_bytes_per_token: int = 0) -> Machine:
        """The machine with tiers of these sizes in GiB. Refuses contradictory options.

        `kv_bytes_per_token` is the load's own, 0 if it has none; the option replaces it.
        """
        if self.kv_mb_per_token is not None:
            kv_bytes_per_token = round(self.kv_mb_per_token * MIB)
        elif not kv_bytes_per_token:
            kv_bytes_per_token = _KV_BYTES_PER_TOKEN
        if kv_bytes_per_token < 1:
            raise typer.BadParameter(
                f"{self.kv_mb_per_token:g} MiB is less than a byte", param_hint="--kv-mb-per-token"
            )
        if self.service_turns_per_s is not None:
            gpu = "belongs to the GPU's model, which --service-turns-per-s replaces"
            _refuse_given(self, ("decode_tokens_per_s", "batch"), gpu)
        return Machine(
            dram_bytes=round(dram_gb * GIB),
            ssd_bytes=round(ssd_gb * GIB),
            ssd_bytes_per_s=self.ssd_gbps * GIB,
            kv_bytes_per_token=kv_bytes_per_token,
            link_bytes_per_s=self.link_gbps * GIB,
            service_turns_per_s=self.service_turns_per_s,
            prefill_tokens_per_s=self.prefill_tokens_per_s,
            decode_tokens_per_s=self.decode_tokens_per_s or 25.0,
            batch=self.batch or 24,
            blocking_loads=self.blocking_loads,
            always_load=self.always_load,
            reports_answers=not self.unreported_answers,
            overflow_keeps=not self.overflow_drops,
            session_ttl_s=math.inf if self.session_ttl_s is None else self.session_ttl_s,
            gpus=self.gpus,
        )


@dataclass(frozen=True)
class SizeOptions:
    """The sizes of the machine's tiers."""

    dram_gb: Annotated[float, number("--dram-gb", "GiB of DRAM for KV; 0: none.", _MACHINE, most=_SIZE_MAX_GB)] = 128.0
    ssd_gb: Annotated[float, number("--ssd-gb", "GiB of SSD for KV; 0: none.", _MACHINE, most=_SIZE_MAX_GB)] = 10240.0
