"""Who sent a request: the only place where a request's Caller is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kvservice.rpc.interceptors import Context
from kvservice.store.caller import DEFAULT_TENANT, Caller
from kvservice.store.store import BlockStore
from kvservice_api.errors import UnknownClient

_LOCAL = "local"
_ANONYMOUS = "anonymous"
# Properties of a verified client certificate in gRPC, the most specific first. The whole subject, not its common name
# alone: certificates of several organisations may share a common name.
_NAMES = ("peer_spiffe_id", "x509_subject", "x509_subject_alternative_name", "x509_common_name")


class Callers:
    """Makes callers. The store knows which clients are attached."""

    def __init__(self, store: BlockStore) -> None:
        self._store = store

    def of(self, context: Context, client_id: bytes = b"") -> Caller:
        """The caller of a request that names this client, or none. Raises UnknownClient where it is not attached."""
        if client_id and not self._store.is_attached(client_id):
            raise UnknownClient("no attached client has this id: attach, then ask again", field="client_id")
        return Caller(principal(context.peer(), context.auth_context()), DEFAULT_TENANT, client_id)


def principal(peer: str, auth_context: Mapping[str, Iterable[bytes]]) -> str:
    """The name in the client's verified certificate, or what is known without one.

    gRPC does not give the uid of a UNIX socket's peer, so every process that may open the socket is "local".
    """
    for name in _NAMES:
        for value in auth_context.get(name, ()):
            if value:
                return value.decode("utf-8", "backslashreplace")
    return _LOCAL if peer.startswith("unix:") else _ANONYMOUS
