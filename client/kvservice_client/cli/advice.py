"""The operator's next step after an error."""

from __future__ import annotations

from kvservice_api.errors import (
    BlockNotFound,
    DaemonTooOld,
    DeadlineExceeded,
    Draining,
    IndexFull,
    InvalidRequest,
    KVError,
    Overloaded,
    PinsFull,
    RequestNotFound,
    ScrubRunning,
    SessionNotFound,
    SessionsFull,
    StorageFailed,
    TlsFileUnusable,
    UnknownLayout,
)

_ADVICE: dict[type[KVError], str] = {
    BlockNotFound: "See what is stored with `kvctl ls`.",
    DaemonTooOld: "`kvctl version` shows both versions.",
    DeadlineExceeded: "The daemon is busy or out of reach; allow more time with --timeout.",
    Draining: "`kvctl drain --undo` ends a drain. A daemon that is stopping cannot undo it: ask again once it is back.",
    IndexFull: "Make the index larger with the setting of its map's size.",
    InvalidRequest: "Correct what was given; nothing has changed.",
    Overloaded: "Try again in a moment.",
    PinsFull: "Unpin others with `kvctl unpin`, or raise the setting `pins.fraction_max`.",
    RequestNotFound: "Engines name their requests when they look up. Of a block's key, at least the first 6 of its 64 "
    "hexadecimal digits are needed.",
    ScrubRunning: "Wait for the scrub that runs, then try again.",
    SessionsFull: "End some sessions, or raise the setting `session.sessions_max`.",
    SessionNotFound: "See which there are with `kvctl sessions`.",
    UnknownLayout: "See which there are with `kvctl layouts`.",
    TlsFileUnusable: "Correct the file, or name another one; see `kvctl COMMAND --help`.",
    StorageFailed: "The daemon's log says which file failed; check the disk.",
}


def advice(error: KVError) -> str:
    """One sentence. For a daemon that cannot be reached it depends on the address: see ``unreachable``."""
    return _ADVICE.get(type(error), "The daemon's log may say more.")
