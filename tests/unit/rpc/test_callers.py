"""Callers: one value per request, made in one place; every operation of the store requires it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

import kvservice
from kvservice.rpc.calls import CallCounts, Callers, guarded
from kvservice.store.caller import DEFAULT_TENANT, Caller, Tenant
from kvservice.store.hints.exchange import HintExchange
from kvservice.store.layouts import Layouts
from kvservice.store.leases import Client, Leases
from kvservice.store.lookups import Lookups
from kvservice.store.mover.requested_moves import RequestedMoves
from kvservice.store.operations.drain import Drain
from kvservice.store.operations.gauges import Gauges
from kvservice.store.operations.operators import Operators
from kvservice.store.operations.pins import Pins
from kvservice.store.operations.policies import Policies
from kvservice.store.operations.scrub import Scrub
from kvservice.store.sessions.sessions import Sessions
from kvservice.store.status import Status
from kvservice.store.tasks import LoopBudget
from kvservice.store.tickets import Tickets
from kvservice.store.transfers.loads import Loads
from kvservice.store.transfers.saves import Saves
from kvservice_api.errors import UnknownClient
from kvservice_api.status import from_rpc_error
from tests.certificates import Authority, Pair
from tests.stores import CALLER, LAYOUT, WHOLE, OpenStore, StoreFiles, caller_of, some_chain, some_images

_SOURCES = Path(kvservice.__file__).parent
# What others may use of a store: the operations of its public parts, plain values, and its start and end.
_PARTS = {
    "drain": Drain,
    "gauges": Gauges,
    "hints": HintExchange,
    "layouts": Layouts,
    "leases": Leases,
    "loads": Loads,
    "lookups": Lookups,
    "moves": RequestedMoves,
    "operators": Operators,
    "pins": Pins,
    "policies": Policies,
    "saves": Saves,
    "scrub": Scrub,
    "sessions": Sessions,
    "status": Status,
    "tickets": Tickets,
}
# Their public methods are all for listeners, and none for other parts.
_OFFERED_WHOLE = {
    "layouts",
    "loads",
    "lookups",
    "moves",
    "operators",
    "pins",
    "policies",
    "saves",
    "scrub",
    "tickets",
}
_VALUES = {"boot_epoch", "clock", "limits", "store_id", "tier_names"}
_READINGS = {
    ("drain", "state_name"),
    ("gauges", "read"),
    ("leases", "is_attached"),
    ("status", "arena"),
    ("status", "block_counts"),
    ("status", "facts"),
}
_STARTS: dict[str, tuple[str, ...]] = {"store": (), "_store": (), **{f"_{name}": (name,) for name in _PARTS}}
_LIFE = {"relocate", "begin_stop", "start", "stop"}


# Where callers are made


def test_a_caller_has_no_part_that_is_assumed_and_cannot_be_changed() -> None:
    assert all(
        field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        for field in dataclasses.fields(Caller)
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        CALLER.principal = "another"  # type: ignore[misc]


def test_requests_get_their_caller_in_one_place() -> None:
    made = {
        path.relative_to(_SOURCES).as_posix()
        for path in _SOURCES.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Caller"
    }
    assert made == {"rpc/calls.py"}


class _StoreUses(ast.NodeVisitor):
    """The attributes of a store that one module reads and calls, also through names that were assigned from it."""

    def __init__(self) -> None:
        self.names: dict[str, tuple[str, ...]] = {"store": ()}
        self.calls: list[tuple[tuple[str, ...], ast.Call]] = []
        self.read: set[tuple[str, ...]] = set()  # The attributes of the store's public parts, or of the store.

    def path(self, node: ast.expr) -> tuple[str, ...] | None:
        """The attributes from the store to this expression; None if it does not begin at one."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self" and node.attr in _STARTS:
                return _STARTS[node.attr]
            before = self.path(node.value)
            return None if before is None else (*before, node.attr)
        return None

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            is_pair = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
            pairs = zip(target.elts, node.value.elts, strict=True) if is_pair else [(target, node.value)]  # type: ignore[attr-defined]
            for name, value in pairs:
                path = self.path(value)
                if isinstance(name, ast.Name) and path is not None:
                    self.names[name.id] = path
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        path = self.path(node)
        if path:
            self.read.add(path[: 2 if path[0] in _PARTS else 1])
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        path = self.path(node.func)
        if path:
            self.calls.append((path, node))
        self.generic_visit(node)


def _uses(*modules: str) -> Iterator[tuple[str, _StoreUses]]:
    """The accesses of these modules of the daemon to a store."""
    for pattern in modules:
        for path in sorted(_SOURCES.glob(pattern)):
            uses = _StoreUses()
            for _ in range(2):  # Names may be used above where they are assigned: methods of one class.
                uses.calls.clear()
                uses.visit(ast.parse(path.read_text()))
            yield path.name, uses


def _read(*modules: str) -> set[tuple[str, ...]]:
    return {way for _, uses in _uses(*modules) for way in uses.read} - {(name,) for name in _PARTS}


def test_listeners_and_metrics_use_the_operations_of_the_store_and_named_plain_values_and_nothing_else() -> None:
    plain = {(name,) for name in _VALUES} | _READINGS
    assert _read("metrics/*.py") == set(), "they read what the daemon reads for them"
    assert _read("daemon.py") <= plain | {(name,) for name in _LIFE} | {("drain", "quiet"), ("drain", "written")}
    used = _read("rpc/*.py", "device/*.py", "bulk/*.py") - plain
    assert used <= _operations(), "others are for the other parts of the store"
    assert used >= {way for way in _operations() if way[0] in _OFFERED_WHOLE}, "no listener offers them"


def _operations() -> set[tuple[str, ...]]:
    """The methods of a store's public parts whose first argument is a caller."""
    found: set[tuple[str, ...]] = set()
    for part, kind in _PARTS.items():
        for name, function in inspect.getmembers(kind, inspect.isfunction):
            parameters = list(inspect.signature(function).parameters.values())[1:]
            if not name.startswith("_") and parameters and parameters[0].name == "caller":
                assert (parameters[0].annotation, parameters[0].default) == ("Caller", inspect.Parameter.empty), name
                found.add((part, name))
    return found


def test_only_the_parts_that_listeners_use_are_public(opened: OpenStore) -> None:
    own = {name for name in dir(opened.store) if not name.startswith("_")}
    assert own == _PARTS.keys() | _VALUES | _LIFE
    for part, kind in _PARTS.items():
        assert type(getattr(opened.store, part)) is kind
    for part in _OFFERED_WHOLE:
        names = {(part, name) for name in dir(getattr(opened.store, part)) if not name.startswith("_")}
        assert names <= _operations()


def test_no_request_reaches_an_operation_of_the_store_without_a_caller() -> None:
    reached = set()
    for module, uses in _uses("rpc/*.py", "device/*.py", "bulk/*.py"):
        for way, call in uses.calls:
            if way[0] in _VALUES or way in _READINGS:
                continue
            given = call.args[0] if call.args else None
            is_made_there = isinstance(given, ast.Call) and ast.unparse(given.func) == "self._callers.of"
            is_given = is_made_there or (isinstance(given, ast.Name) and given.id == "caller")
            assert is_given, f"{module}:{call.lineno}: store.{'.'.join(way)} is not given a caller"
            reached.add(way)
    assert reached == _read("rpc/*.py", "device/*.py", "bulk/*.py") - {(name,) for name in _VALUES} - _READINGS


# The principal


@asynccontextmanager
async def _asked(store: OpenStore, address: str, serving: grpc.ServerCredentials | None) -> AsyncIterator[Any]:
    """A server whose one method answers with the caller's principal, and its port."""
    callers = Callers(store.store)

    async def who(request: bytes, context: Any) -> bytes:
        caller = callers.of(context, request)
        assert (caller.tenant, caller.client) == (DEFAULT_TENANT, request)
        return caller.principal.encode()

    server = grpc.aio.server()
    handlers = {"Who": grpc.unary_unary_rpc_method_handler(guarded(who, CallCounts(), LoopBudget()))}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test", handlers)])
    port = server.add_insecure_port(address) if serving is None else server.add_secure_port(address, serving)
    await server.start()
    yield port
    await server.stop(0)


async def _principal(channel: grpc.aio.Channel, client_id: bytes = b"") -> str:
    async with channel:
        answer: bytes = await channel.unary_unary("/test/Who", None, None)(client_id, timeout=10)
    return answer.decode()


def _serving(authority: Authority, *, asks_clients: bool) -> grpc.ServerCredentials:
    own = authority.issue()
    ca = authority.certificate if asks_clients else None
    return grpc.ssl_server_credentials([(own.key, own.certificate)], ca, asks_clients)


async def test_without_a_certificate_a_caller_is_local_or_anonymous(opened: OpenStore, tmp_path: Path) -> None:
    async with _asked(opened, f"unix:{tmp_path}/socket", None):
        assert await _principal(grpc.aio.insecure_channel(f"unix:{tmp_path}/socket")) == "local"
    async with _asked(opened, "127.0.0.1:0", None) as port:
        assert await _principal(grpc.aio.insecure_channel(f"127.0.0.1:{port}")) == "anonymous"
    authority = Authority()
    async with _asked(opened, "127.0.0.1:0", _serving(authority, asks_clients=False)) as port:
        trust = grpc.ssl_channel_credentials(authority.certificate)
        assert await _principal(grpc.aio.secure_channel(f"localhost:{port}", trust)) == "anonymous"


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        (lambda authority: authority.issue("engine-1"), "CN=engine-1"),
        (lambda authority: authority.issue("", host="engine-2.example"), "engine-2.example"),
    ],
    ids=["subject", "alternative name"],
)
async def test_a_verified_certificate_names_the_principal(opened: OpenStore, pair: Any, expected: str) -> None:
    authority = Authority()
    own: Pair = pair(authority)
    async with _asked(opened, "127.0.0.1:0", _serving(authority, asks_clients=True)) as port:
        shown = grpc.ssl_channel_credentials(authority.certificate, own.key, own.certificate)
        assert await _principal(grpc.aio.secure_channel(f"localhost:{port}", shown)) == expected


async def test_a_request_that_names_a_client_which_is_not_attached_is_refused(
    opened: OpenStore, client: Client, tmp_path: Path
) -> None:
    address = f"unix:{tmp_path}/socket"
    async with _asked(opened, address, None):
        assert await _principal(grpc.aio.insecure_channel(address), client.client_id) == "local"
        opened.store.leases.detach(CALLER, client)
        for client_id in (client.client_id, b"unknown", bytes(16)):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await _principal(grpc.aio.insecure_channel(address), client_id)
            assert isinstance(from_rpc_error(refused.value), UnknownClient)


# The tenant


@pytest.mark.parametrize("on_ssd", [False, True])
async def test_blocks_are_of_the_tenant_of_the_caller_who_saved_them_also_after_a_restart(
    store_files: Any, on_ssd: bool
) -> None:
    files: StoreFiles = store_files()
    opened = files.open()
    await opened.store.layouts.open(CALLER, LAYOUT)
    client = opened.store.leases.attach(CALLER, "test")
    ours, theirs = some_chain(2, seed=0), some_chain(2, seed=1)
    other = dataclasses.replace(caller_of(client), tenant=Tenant(0xFFFFFFFE, "another"))
    for caller, chain in ((caller_of(client), ours), (other, theirs)):
        await opened.save(client, chain, some_images(chain), on_ssd=on_ssd, caller=caller)
    tenants = {ours.keys[0]: 0, ours.keys[1]: 0, theirs.keys[0]: 0xFFFFFFFE, theirs.keys[1]: 0xFFFFFFFE}

    def found(opened: OpenStore) -> dict[bytes, int]:
        blocks = opened.blocks
        return {key: int(blocks.tenant[blocks.row_of(key, WHOLE)]) for key in tenants}

    assert found(opened) == tenants
    await opened.close()
    if on_ssd:
        files.lose_power()
    again = files.open()
    assert found(again) == tenants
    await again.close()
