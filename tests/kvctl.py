"""``kvctl`` as a program of ``process_starter``: what the installed script does, without a new interpreter."""

from __future__ import annotations

import sys

from kvservice_client.cli import main

if __name__ == "__main__":
    sys.argv[0] = "kvctl"
    __package__ = ""  # Otherwise the usage message would name Python and this module.
    main()
