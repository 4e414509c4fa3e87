"""``kvctl``: one verb per file, found by the entry-point group ``kvctl.commands``.

A verb is a function with typer's annotations; its docstring is its help. The client's own verbs and
those of other packages are registered in the same way, in a package's ``pyproject.toml``.
"""

from __future__ import annotations

import difflib
import errno
import os
import sys
from importlib.metadata import EntryPoint, entry_points
from importlib.metadata import version as installed_version
from inspect import signature
from typing import Annotated, NoReturn

import typer

from kvservice_api.errors import DaemonUnavailable, KVError
from kvservice_client.cli.advice import advice
from kvservice_client.cli.options import VARIABLES, checked_address, why_no_answer, with_tls_options

GROUP = "kvctl.commands"


def run() -> None:
    """Run ``kvctl`` with the arguments of this process."""
    if unknown := sorted(name for name in os.environ if name.startswith("KVCTL_") and name not in VARIABLES):
        nearest = difflib.get_close_matches(unknown[0], VARIABLES, n=1, cutoff=0)[0]
        print(
            f"kvctl: {unknown[0]} in the environment is no variable of kvctl; the nearest is {nearest}", file=sys.stderr
        )
        sys.exit(2)
    if sys.argv[1:] == ["help"]:
        sys.argv[1:] = ["--help"]
    try:
        app(sys.argv[1:2])(prog_name="kvctl")
    except KVError as error:
        hint = why_no_answer() if type(error) is DaemonUnavailable else advice(error)
        print(f"kvctl: {error.message.rstrip('.')}. {hint}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.filename is not None:
            raise
        _end_without_output(error)
    except SystemExit as end:
        try:
            if sys.stdout is not None:
                sys.stdout.flush()  # Here, where kvctl can still report an error.
        except OSError as error:
            _end_without_output(None if end.code else error)
        raise


def _end_without_output(error: OSError | None) -> NoReturn:
    """End with exit code 1: what was printed cannot be written, as on a full disk. A closed pipe takes no message."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # Otherwise the interpreter tries to write the rest again, and prints the error.
    if error is not None and error.errno != errno.EPIPE:
        print(f"kvctl: the output cannot be written: {error.strerror}", file=sys.stderr)
    sys.exit(1)


def app(first_arguments: list[str]) -> typer.Typer:
    """The program with all verbs, or with only the one that the first argument names, which starts faster."""
    program = typer.Typer(
        help="Looks after a KVService daemon.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    program.callback()(_before_the_verb)
    verbs = sorted(entry_points(group=GROUP), key=lambda verb: verb.name)
    for verb in [each for each in verbs if [each.name] == first_arguments] or verbs:
        _add(program, verb)
    return program


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"kvctl {installed_version('kvservice')}")
        raise typer.Exit


def _checked_if_given(text: str) -> str:
    return text and checked_address(text)


def _before_the_verb(
    context: typer.Context,
    address: Annotated[
        str, typer.Option(help="The daemon's address. It may also follow the command.", callback=_checked_if_given)
    ] = "",
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show kvctl's version and exit.")
    ] = False,
) -> None:
    name = context.invoked_subcommand
    if not address or name is None:
        return
    if not _has_address(name):
        raise typer.BadParameter(f"kvctl {name} needs no daemon", param_hint="--address")
    os.environ["KVCTL_ADDRESS"] = address  # The verb's own option goes before it.
    context.default_map = {name: {"address": address}}  # For `bench`, whose option does not read the variable.


def _has_address(name: str) -> bool:
    """Whether this verb takes an address, or cannot be loaded: then it says why."""
    (verb,) = entry_points(group=GROUP, name=name)
    try:
        return "address" in signature(verb.load()).parameters
    except ImportError:
        return True


def _add(program: typer.Typer, verb: EntryPoint) -> None:
    try:
        program.command(verb.name)(with_tls_options(verb.load()))
    except ImportError as error:
        refusal, exit_code = f"cannot run here: {error}. Install KVService with the extra 'daemon'.", 1
        if (error.name or "").partition(".")[0] == "benchmarks":
            refusal, exit_code = "runs in a checkout of KVService's repository only, which has benchmarks/.", 2

        @program.command(
            verb.name,
            help="Not available: its packages are not installed.",
            context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        )
        def refuse() -> None:
            print(f"kvctl: {verb.name} {refusal}", file=sys.stderr)
            raise typer.Exit(exit_code)
