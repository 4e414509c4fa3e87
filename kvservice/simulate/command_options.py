"""What ``kvctl simulate`` and ``kvctl plan`` are told alike: the load and the machine. The impossible is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated

import typer

from kvservice.simulate import generate, traces
from kvservice.simulate.command_parts import fail, number, span
from kvservice.simulate.generated_hints import with_typing_hints
from kvservice.simulate.settings import GIB, MIB, Machine
from kvservice.simulate.think_times import SHAPES
from kvservice.simulate.workload import Workload

GENERATORS = ("sharegpt", "people")

_SIZE_MAX_GB = 1e9  # An exabyte: bytes stay within 64 bits, with room to add them up.
_LOAD, _MACHINE, _GPU = "The load", "The machine", "The GPU's model, in place of --service-turns-per-s"


@dataclass(frozen=True)
class LoadOptions:
    """A trace, or what a generator is asked for. None: not said."""

    trace: Annotated[
        str,
        typer.Option(
            metavar="FILE|sharegpt|people",
            help="A file of turns; or generated: conversations as in ShareGPT, or the people at a real service.",
        ),
    ]
    format: Annotated[str, typer.Option(help=f"How the file is written: {', '.join(traces.FORMATS)}.")] = "auto"
    warmup_turns: Annotated[int, number("--warmup-turns", "Turns that are played before it is measured.")] = 0
    seed: Annotated[int, number("--seed", "Another number, another load of the same kind.", _LOAD)] = 0
    sessions: Annotated[
        int | None,
        number("--sessions", "Of generated load.", _LOAD, least=1, most=1e7, show_default="9000; people: 2000"),
    ] = None
    session_rate: Annotated[
        float | None,
        number("--session-rate", "Sessions that begin a second.", _LOAD, above=True, show_default="1; people: 0.2"),
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
            help=f"How think times are spread: {', '.join(SHAPES)}.",
            rich_help_panel=_LOAD,
            show_default="people",
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
            help="Hints: that somebody types is told A to B seconds before the request.",
            rich_help_panel=_LOAD,
        ),
    ] = None
    false_hints: Annotated[
        float, number("--false-hints", "The share of hints that are wrong.", _LOAD, most=1, below=True)
    ] = 0.0

    def workload(self) -> Workload:
        """The turns. Ends the program where the trace is bad, refuses what does not go together."""
        if self.false_hints and self.typing_lead_s is None:
            raise typer.BadParameter(
                "says how many hints are wrong: give --typing-lead-s too", param_hint="--false-hints"
            )
        lead_s = None if self.typing_lead_s is None else span(self.typing_lead_s, "--typing-lead-s")
        workload = self._generated(lead_s) if self.trace in GENERATORS else self._read(lead_s)
        if self.warmup_turns >= workload.turns:
            left = f"{self.warmup_turns} leaves nothing to measure: there are {workload.turns} turns"
            raise typer.BadParameter(left, param_hint="--warmup-turns")
        return workload

    def _generated(self, lead_s: tuple[float, float] | None) -> Workload:
        if self.format != "auto":
            raise typer.BadParameter(f"is for files; {self.trace} is generated", param_hint="--format")
        shape = self.think_shape or "people"
        if shape not in SHAPES:
            known = ", ".join(SHAPES)
            raise typer.BadParameter(f"no shape is called {shape!r}; there are {known}", param_hint="--think-shape")
        if self.trace == "people":
            return generate.people(
                users=self.sessions or 2000,
                user_rate=self.session_rate or 0.2,
                think_s=self.think_s,
                shape=shape,
                context_tokens=self.context or 0,
                typing_lead_s=lead_s,
                false_hints=self.false_hints,
                seed=self.seed,
            )
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
        for name in ("sessions", "session_rate", "think_s", "think_shape"):
            if getattr(self, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise typer.BadParameter(f"is for generated load; {self.trace} is a file", param_hint=flag)
        if self.format not in traces.FORMATS:
            known = ", ".join(traces.FORMATS)
            raise typer.BadParameter(f"no format is called {self.format!r}; there are {known}", param_hint="--format")
        try:
            workload = traces.read(self.trace, self.format)
        except traces.TraceError as error:
            fail(f"--trace: {error}")
        if self.context is not None:
            workload = replace(workload, context_tokens=self.context)
        if lead_s is not None:
            try:
                workload = with_typing_hints(workload, lead_s, self.false_hints, self.seed)
            except ValueError as error:
                raise typer.BadParameter(str(error), param_hint="--typing-lead-s") from None
        return workload


@dataclass(frozen=True)
class RateOptions:
    """All of the machine but the sizes of its tiers."""

    ssd_gbps: Annotated[
        float, number("--ssd-gbps", "GiB that the SSD moves a second, reads and writes together.", _MACHINE, above=True)
    ] = 5.0
    kv_mb_per_token: Annotated[
        float,
        number("--kv-mb-per-token", "MiB of KV a token has: 0.78125 for 13B, 2.5 for 65B.", _MACHINE, most=1e5),
    ] = 0.78125
    link_gbps: Annotated[
        float, number("--link-gbps", "GiB that go from DRAM to the GPU in a second.", _MACHINE, above=True)
    ] = 24.2
    service_turns_per_s: Annotated[
        float | None,
        number(
            "--service-turns-per-s",
            "A server that takes so many turns a second.",
            _MACHINE,
            above=True,
            show_default="the GPU's model",
        ),
    ] = None
    prefill_tokens_per_s: Annotated[
        float, number("--prefill-tokens-per-s", "How fast prompts are computed.", _MACHINE, above=True)
    ] = 8000.0
    gpus: Annotated[int, number("--gpus", "How many the machine has, for its cost.", _MACHINE, least=1, most=1e6)] = 1
    readiness_aware: Annotated[
        bool,
        typer.Option(
            "--readiness-aware",
            help="A waiting request whose KV is in DRAM may go before one that waits for the SSD.",
            rich_help_panel=_MACHINE,
        ),
    ] = False
    overflow_drops: Annotated[
        bool,
        typer.Option(
            "--overflow-drops",
            help="Positions are coupled to keys: a conversation that outgrows the window loses its KV.",
            rich_help_panel=_MACHINE,
        ),
    ] = False
    session_ttl_s: Annotated[
        float | None,
        number(
            "--session-ttl-s", "A session that is idle for so long ends.", _MACHINE, above=True, show_default="never"
        ),
    ] = None
    decode_tokens_per_s: Annotated[
        float | None,
        number("--decode-tokens-per-s", "Of each sequence in a batch.", _GPU, above=True, show_default="25"),
    ] = None
    batch: Annotated[
        int | None, number("--batch", "Sequences that decode at a time.", _GPU, least=1, most=1e6, show_default="24")
    ] = None

    def machine(self, dram_gb: float, ssd_gb: float) -> Machine:
        kv_bytes_per_token = round(self.kv_mb_per_token * MIB)
        if kv_bytes_per_token < 1:
            raise typer.BadParameter(
                f"{self.kv_mb_per_token:g} MiB is less than a byte", param_hint="--kv-mb-per-token"
            )
        if self.service_turns_per_s is not None:
            for name in ("decode_tokens_per_s", "batch"):
                if getattr(self, name) is not None:
                    flag = f"--{name.replace('_', '-')}"
                    raise typer.BadParameter(
                        "is of the GPU's model; --service-turns-per-s replaces it", param_hint=flag
                    )
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
            readiness_aware=self.readiness_aware,
            overflow_keeps=not self.overflow_drops,
            session_ttl_s=math.inf if self.session_ttl_s is None else self.session_ttl_s,
            gpus=self.gpus,
        )


@dataclass(frozen=True)
class SizeOptions:
    dram_gb: Annotated[float, number("--dram-gb", "GiB of DRAM for KV; 0: none.", _MACHINE, most=_SIZE_MAX_GB)] = 128.0
    ssd_gb: Annotated[float, number("--ssd-gb", "GiB of SSD for KV; 0: none.", _MACHINE, most=_SIZE_MAX_GB)] = 10240.0
