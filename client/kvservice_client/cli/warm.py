"""``kvctl warm``: promote a conversation's history to DRAM before its next turn."""

from __future__ import annotations

from typing import Annotated

import typer

from kvservice_api.errors import SessionNotFound
from kvservice_api.keys import split_keys
from kvservice_client.cli import output
from kvservice_client.cli.options import Address, AsJson, LayoutOption, Timeout, checked_digits, connect, layout_of
from kvservice_client.client import DEFAULT_ADDRESS, PrefetchResult

_KEYS_AT_A_TIME = 32  # Each of these requests waits for the disk, and updates the progress.
_SLICES_MAX = 2**20


def warm(
    session: Annotated[str, typer.Argument(metavar="SESSION", help="The session's id.")],
    layout: LayoutOption = "",
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 60.0,
    as_json: AsJson = False,
) -> None:
    """Promote all blocks of a session to DRAM, and wait for it. Counts as a use of the session."""
    digits = checked_digits(layout, "layout") if layout else ""
    with connect(address, timeout) as client, output.progress() as progress:
        found = list(client.admin.list_sessions(session, layout_of(client, digits))) if session else []
        if not found:
            raise SessionNotFound(f"there is no session {session!r}", session_id=session)
        keys: dict[bytes, None] = {}  # After a truncation a block may have several slices.
        for each in found:
            slices = client.admin.get_session(each.session_id, each.layout_fingerprint).session.slices
            keys.update(dict.fromkeys(split_keys(slices.keys, field="keys", count_max=_SLICES_MAX)))
        wanted = list(keys)
        task = progress.add_task("warming", total=len(wanted))
        total = PrefetchResult(0, 0, 0, 0)
        for start in range(0, len(wanted), _KEYS_AT_A_TIME):
            some = client.prefetch(wanted[start : start + _KEYS_AT_A_TIME], wait=True)
            total = PrefetchResult(*map(sum, zip(total, some, strict=True)))
            progress.update(task, completed=start + _KEYS_AT_A_TIME)
    if as_json:
        output.print_json({"sessions": len(found), "blocks": len(wanted), **total._asdict()})
        return
    print(
        f"promoted {total.promoted}, {total.in_dram} were in DRAM, {total.missing} are not stored, "
        f"{total.failed} could not be promoted"
    )
