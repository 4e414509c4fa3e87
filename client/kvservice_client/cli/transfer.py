"""What `kvctl export` and `kvctl import` share: their progress, and their errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from kvservice_api.errors import KVError
from kvservice_api.interrupts import interruptible
from kvservice_client.cli import output
from kvservice_client.cli.advice import advice
from kvservice_client.exports.export_file import UnusableFile
from kvservice_client.retry import SYSTEM_CLOCK, Clock

STANDARD_STREAM = "-"
_LINE_EVERY_S = 10.0


@contextmanager
def progress(doing: str, total: int | None, clock: Clock = SYSTEM_CLOCK) -> Iterator[Callable[[int, str], None]]:
    """Shows how far a transfer is: call it with what is done of `total`, and a text.

    On a terminal a bar; else a line on stderr every ten seconds.
    """
    with output.progress() as bar:
        task = bar.add_task(doing, total=total)
        line_at_s = clock.now_s() + _LINE_EVERY_S

        def show(completed: int, text: str) -> None:
            nonlocal line_at_s
            bar.update(task, description=f"{doing} ({text})", completed=completed)
            if bar.disable and clock.now_s() >= line_at_s:
                line_at_s = clock.now_s() + _LINE_EVERY_S
                share = f"{100 * completed // total} %, " if total else ""
                print(f"kvctl: {doing}: {share}{text}", file=sys.stderr, flush=True)

        yield show


@contextmanager
def failures(file: str, how_to_continue: str) -> Iterator[None]:
    """Ends the verb with exit code 1 for what can go wrong in the middle of a transfer, and says how to continue."""
    try:
        with interruptible():
            yield
    except UnusableFile as error:
        fail(f"{name_of(file)}: {error}. {error.what_helps}")
    except KVError as error:
        fail(f"{error.message.rstrip('.')}. {advice(error)} {how_to_continue}")
    except OSError as error:
        fail(f"{name_of(file)}: {error.strerror}. {how_to_continue}")
    except KeyboardInterrupt:
        fail(f"interrupted. {how_to_continue}", 130)


def fail(message: str, code: int = 1) -> NoReturn:
    """End the verb with one line on stderr."""
    print(f"kvctl: {message}".rstrip(), file=sys.stderr)
    raise typer.Exit(code)


def name_of(file: str) -> str:
    return "the pipe" if file == STANDARD_STREAM else file
