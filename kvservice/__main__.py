"""The command line: ``kvservice serve``, ``config``, ``check``, ``remove``, ``arenas`` and ``completion``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from kvservice import __version__
from kvservice_api.interrupts import end_at_interrupts

_USAGE = """\
usage: kvservice COMMAND [OPTIONS]

commands:
  serve      run the daemon; --help lists its settings
  config     print the settings that serve would have, and where each comes from
  check      verify a stopped store, and repair it with --repair
  remove     delete a stopped store with all its blocks, on disk and in memory
  arenas     list the arenas in shared memory, and delete those whose store is gone
  completion print a script for the shell: eval "$(kvservice completion)"

options:
  --version  print the version
  --help     print this text

To look at a running daemon: kvctl --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 failed (or `check` found problems), 2 used wrongly.

    Without `argv` it is the program: Ctrl-C ends the process at once. Every command may be killed. A daemon that
    serves ends as at SIGTERM.
    """
    if argv is None:
        end_at_interrupts()
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    try:
        return _run(command, rest)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in {"kvservice", "kvservice_api", *sys.stdlib_module_names}:
            raise
        print(f"kvservice: {error.name} is not installed. Install KVService with the extra 'daemon'.", file=sys.stderr)
        return 1


def _run(command: str, rest: list[str]) -> int:
    if command == "serve":
        return _serve(rest)
    if command == "check":
        from kvservice import check

        return check.main(rest)
    if command == "config":
        from kvservice import effective_config

        return effective_config.main(rest, os.environ)
    if command == "remove":
        from kvservice import remove

        return remove.main(rest)
    if command == "arenas":
        from kvservice import arenas

        return arenas.main(rest)
    if command in ("completion", "--version") and rest:
        print(f"kvservice {command}: it has no arguments", file=sys.stderr)
        return 2
    if command == "completion":
        from kvservice import completion

        print(completion.script(), end="")
        return 0
    if command == "--version":
        print(f"kvservice {__version__}")
        return 0
    asked = command in ("--help", "-h")
    if not asked:
        print(f"kvservice: {f'{command!r} is no command' if command else 'a command is missing'}", file=sys.stderr)
    print(_USAGE, end="", file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def _serve(argv: Sequence[str]) -> int:
    # Read once, when gRPC is imported. By default it writes a line, which is not JSON, for each failed TLS handshake:
    # a stranger could fill the log.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

    from kvservice import process

    process.open_standard_files()

    import uvloop

    from kvservice import daemon, logs
    from kvservice.config import ConfigError
    from kvservice.config_sources import load_settings
    from kvservice.host_limits import expect_address_space, expect_threads, raise_open_files_limit
    from kvservice.index.errors import StoreDamaged, StoreError
    from kvservice.tiers.base import StoreMismatch
    from kvservice_api.errors import KVError

    try:
        settings = load_settings(argv, os.environ)
    except ConfigError as error:
        print(f"kvservice serve: {error}", file=sys.stderr)
        return 2
    logs.set_up(settings.log.level, settings.log.format)
    try:
        bulk_connections = 0 if settings.server.bulk_address == "off" else settings.server.bulk_connections_max
        raise_open_files_limit(len(settings.ssd_directories), bulk_connections)  # Before others open files.
        expect_threads(settings.ssd_threads + sum(tier.io_threads for tier in settings.tiers.below_ssd))
        expect_address_space(int(settings.dram.capacity_bytes) + settings.durable_map_bytes)
        uvloop.run(daemon.run(settings), loop_factory=process.EventLoop)
    except ConfigError as error:  # A path or an address in the settings cannot be used.
        print(f"kvservice serve: {error}", file=sys.stderr)
        return 2
    except StoreDamaged as error:
        print(f"kvservice serve: {error}. {error.what_helps}", file=sys.stderr)
        return 1
    except (StoreError, StoreMismatch, KVError, OSError, RuntimeError) as error:
        print(f"kvservice serve: {error}", file=sys.stderr)
        return 1
    finally:
        process.end_within(process.CLOSE_TIMEOUT_S)  # gRPC and the interpreter end after this.
    return 0


if __name__ == "__main__":
    sys.exit(main())
