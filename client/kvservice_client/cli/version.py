"""``kvctl version``: the versions of this program and of the daemon."""

from __future__ import annotations

from importlib.metadata import version as installed_version

from kvservice_api.copying import implementation
from kvservice_api.errors import DaemonUnavailable
from kvservice_client.cli import output
from kvservice_client.cli.options import Address, AsJson, Timeout, connect, why_no_answer
from kvservice_client.client import DEFAULT_ADDRESS


def version(address: Address = DEFAULT_ADDRESS, timeout: Timeout = 5.0, as_json: AsJson = False) -> None:
    """Show the versions of kvctl and of the daemon, and whether this installation has the C extension for copies.

    Exit code 0 also if no daemon answers.
    """
    ours, theirs, why = installed_version("kvservice"), None, ""
    with connect(address, timeout) as client:
        try:
            theirs = client.admin.status().version
        except DaemonUnavailable:
            why = why_no_answer()
    if as_json:
        output.print_json({"kvctl": ours, "daemon": theirs, "copies": implementation()})
        return
    print(f"kvctl {ours}; copies of shared memory are {implementation()}")
    print(f"kvservice {theirs} at {address}" if theirs else f"no daemon answers at {address}. {why}")
