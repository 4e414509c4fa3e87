"""The caller of a verb: the value that every verb of the store takes, so that rules can depend on it.

A request's caller is made in one place, ``rpc/calls.py``. What a caller may see or use is not limited yet:
there is only one tenant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Tenant(NamedTuple):
    """The owner of blocks. `number` is in the block table and in index records, as a u32."""

    number: int
    name: str


DEFAULT_TENANT = Tenant(0, "default")


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request. Its fields have no defaults: a caller is always given explicitly."""

    principal: str  # The client certificate's name; "local" over a UNIX socket; "anonymous" over plain TCP.
    tenant: Tenant
    client: bytes  # The id of the attached client; empty if the request names none.
