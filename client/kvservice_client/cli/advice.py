"""What an operator does next after an error."""

from __future__ import annotations

from kvservice_api.errors import (
    BlockNotFound,
    DaemonUnavailable,
    DeadlineExceeded,
    Draining,
    KVError,
    Overloaded,
    ScrubRunning,
    SessionNotFound,
    StorageFailed,
)

_ADVICE: dict[type[KVError], str] = {
    BlockNotFound: "See what is stored with `kvctl ls`.",
    DaemonUnavailable: "Start a daemon with `kvservice serve`, or name another one with --address.",
    DeadlineExceeded: "The daemon is busy or out of reach; allow more time with --timeout.",
    Draining: "The daemon is stopping; ask again once it is back.",
    Overloaded: "Try again in a moment.",
    ScrubRunning: "Wait for the scrub that runs, then try again.",
    SessionNotFound: "See which there are with `kvctl sessions`.",
    StorageFailed: "The daemon's log says which file failed; check the disk.",
}


def advice(error: KVError) -> str:
    return _ADVICE.get(type(error), "The daemon's log may say more.")
