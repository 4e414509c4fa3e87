"""The program ``kvctl``. It is outside of `kvservice_client`, whose import takes up to a second."""

from __future__ import annotations

from kvservice_api.interrupts import end_at_interrupts


def main() -> None:
    """Exit code 0: done; 1: failed, stderr says why; 2: wrong usage."""
    end_at_interrupts()  # Before the other packages are imported.
    from kvservice_client.cli import main as run

    run()


if __name__ == "__main__":
    main()
