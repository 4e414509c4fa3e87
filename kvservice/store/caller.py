"""Who asks: the value that every verb of the store takes, so that a rule can know for whom it decides.

A request's caller is made in one place, ``rpc/calls.py``. What a caller may see or use is not limited yet:
there is one tenant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Tenant(NamedTuple):
    """Whose blocks they are. `number` stands in the table of blocks and in index records, as a u32."""

    number: int
    name: str


DEFAULT_TENANT = Tenant(0, "default")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks the store for something. No part of it has a default: a caller is stated, never assumed."""

    principal: str  # The client certificate's name; "local" over a UNIX socket; "anonymous" over plain TCP.
    tenant: Tenant
    client: bytes  # The id of the attached client that asks; empty where the request names none.
