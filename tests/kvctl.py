"""``kvctl`` as a program of ``process_starter``: what the installed script does, without a new interpreter."""

from __future__ import annotations

from kvctl import main

if __name__ == "__main__":
    main()
