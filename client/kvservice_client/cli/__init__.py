"""``kvctl``: `program` runs the verbs, one per file."""

import sys


def main() -> None:
    """Run ``kvctl`` with the arguments of this process."""
    try:
        from kvservice_client.cli.program import run
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "typer"):
            raise
        print(f"kvctl: {error.name} is not installed. Install KVService with the extra 'cli'.", file=sys.stderr)
        sys.exit(1)
    run()
