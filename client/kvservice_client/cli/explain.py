"""``kvctl explain``: why a block is where it is, why a request was a miss, how much of a session is stored."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console

from kvservice_api.errors import BlockNotFound, InvalidRequest, RequestNotFound, SessionNotFound
from kvservice_api.keys import KEY_BYTES
from kvservice_api.v1 import admin_pb2 as pb
from kvservice_api.v1 import blocks_pb2
from kvservice_client.cli import output, reasons
from kvservice_client.cli.options import Address, AsJson, Timeout, checked_digits, connect, keys_of
from kvservice_client.client import DEFAULT_ADDRESS, Client

Explained = pb.ExplainedBlock | pb.ExplainedRequest | pb.ExplainedSession


def explain(
    what: Annotated[
        str,
        typer.Argument(
            metavar="KEY|SESSION|REQUEST",
            help="A block's key, or its first digits; or the id of a session or request.",
        ),
    ],
    is_request: Annotated[bool, typer.Option("--request", help="The id is a request's, in any form.")] = False,
    is_session: Annotated[bool, typer.Option("--session", help="The id is a session's, in any form.")] = False,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 5.0,
    as_json: AsJson = False,
) -> None:
    """Show where a block is and why, or why it is missing; how much of a session is stored; how a request went.

    An id is searched among the requests first, then among the sessions.
    """
    if not what:
        raise typer.BadParameter(
            "give a block's key, or the id of a session or request", param_hint="KEY|SESSION|REQUEST"
        )
    if is_request and is_session:
        raise typer.BadParameter("give one of --request and --session", param_hint="--session")
    with connect(address, timeout) as client:
        answer = _asked(client, what, is_request=is_request, is_session=is_session)
    if as_json:
        plain = [output.plain(each) for each in answer]
        output.print_json({"sessions": plain} if isinstance(answer[0], pb.ExplainedSession) else plain[0])
        return
    for each in answer:
        if isinstance(each, pb.ExplainedBlock):
            _print_block(each, output.console())
        elif isinstance(each, pb.ExplainedRequest):
            _print_request(each, output.console())
        else:
            _print_session(each, output.console())


def _asked(client: Client, what: str, *, is_request: bool, is_session: bool) -> Sequence[Explained]:
    if is_session:
        return client.admin.explain_session(what)
    if _is_key(what) and not is_request:
        return [client.admin.explain_block(bytes.fromhex(what))]
    try:
        return [client.admin.explain_request(what)]
    except RequestNotFound:
        if is_request:
            raise
        try:
            return client.admin.explain_session(what)
        except SessionNotFound as error:
            other = f"no request with the id {what!r} is remembered, and {error.message}"
            if set(what) <= set(string.hexdigits):
                try:
                    return [_block_of(client, checked_digits(what, "key"))]
                except typer.BadParameter:  # Too few digits: the advice for this error says how many are needed.
                    pass
                except BlockNotFound:
                    none = f"no block whose key begins with {what} is stored or remembered"
                    raise BlockNotFound(f"{none}, {other}", key=what) from None
            raise RequestNotFound(other) from None


def _block_of(client: Client, digits: str) -> pb.ExplainedBlock:
    """The stored block whose key begins with these digits, else one that is gone. Raises BlockNotFound; InvalidRequest
    if there are several.
    """
    try:
        (key,) = keys_of(client, [digits])
    except BlockNotFound:
        try:
            return client.admin.explain_remembered_block(digits)
        except InvalidRequest as error:
            if error.details.get("field") != "key_prefix":  # An older daemon does not know this field.
                raise BlockNotFound(error.message, key=digits) from None
            raise
    return client.admin.explain_block(key)


def _is_key(text: str) -> bool:
    return len(text) == 2 * KEY_BYTES and set(text) <= set(string.hexdigits)


def _print_block(block: pb.ExplainedBlock, console: Console) -> None:
    def say(line: str) -> None:
        console.print(line, markup=False)

    say(f"block {block.key.hex()}")
    if not block.shards:
        say(f"not stored: {reasons.miss(block.miss)}")
    for shard in block.shards:
        stored = shard.block
        part = stored.shard
        say(
            f"stored at {output.when(stored.stored_at)}: layers {part.layer_begin}..{part.layer_end}, "
            f"heads {part.head_begin}..{part.head_end}, {stored.token_count} tokens, {output.size(stored.size_bytes)}"
        )
        for place in shard.places:
            say(f"  {reasons.arrival(place)}")
        if stored.HasField("pinned_until"):
            say(f"  pinned until {output.when(stored.pinned_until)}")
        if stored.leases or shard.holds:
            say(f"  kept in place by {stored.leases} leases and {shard.holds} running transfers")
        say(f"  used last at {output.when(stored.used_at)}, {stored.hits} {'hit' if stored.hits == 1 else 'hits'}")
    if block.HasField("worth"):
        for line in reasons.worth(block.worth):
            say(line)
    past = block.events if block.shards else block.events[1:]
    for event in past:
        say(f"before: {reasons.event(event)}")


def _print_session(session: pb.ExplainedSession, console: Console) -> None:
    def say(line: str) -> None:
        console.print(line, markup=False)

    about, layout = session.session, session.layout
    say(f"session {about.session_id}")
    say(
        f"layout {about.layout_fingerprint.hex()[:16]} ({f'{layout.model_id} {layout.model_revision}'.strip()}), "
        f"revision {about.revision}, {about.token_count} tokens in {about.slice_count} slices, expires at "
        f"{output.when(about.expires_at)} unless it is used"
    )
    in_dram = sum(run.count for run in session.runs if run.dram)
    say(
        f"  {session.usable_tokens} tokens of it can be used: {session.usable_slices} slices, {in_dram} in dram, "
        f"{session.usable_slices - in_dram} on ssd only"
    )
    if session.HasField("worth"):
        say("  its last usable slice:")
        for line in reasons.worth(session.worth):
            say(f"  {line}")
    if session.HasField("left_dram"):
        say(f"  the first slice that is not in dram, block {session.outside_dram_key.hex()}:")
        say(f"  {reasons.event(session.left_dram)}")
    if session.HasField("miss"):
        say(f"  the next slice is missing, block {session.miss.key.hex()}:")
        say(f"  {reasons.miss(session.miss)}")


def _print_request(request: pb.ExplainedRequest, console: Console) -> None:
    def say(line: str) -> None:
        console.print(line, markup=False)

    say(f"request {request.request_id}")
    for lookup in request.lookups:
        layout, shard = lookup.layout, lookup.shard
        say(
            f"lookup at {output.when(lookup.at)} by {lookup.client_name or 'no attached client'}: layout "
            f"{lookup.layout_fingerprint.hex()[:16]} ({f'{layout.model_id} {layout.model_revision}'.strip()}), "
            f"layers {shard.layer_begin}..{shard.layer_end}, heads {shard.head_begin}..{shard.head_end}"
        )
        say(
            f"  {lookup.hit_blocks} of {lookup.asked_blocks} blocks were stored: {lookup.hit_blocks_in_dram} in dram, "
            f"{lookup.hit_blocks_on_ssd} on ssd only"
        )
        for load in lookup.loads:
            moved = _MOVED.get(load.path) or ("in place" if load.in_place else output.size(load.sent_bytes))
            say(
                f"  load of {load.blocks} blocks, {load.layers} layers: {load.outcome}, {moved} in "
                f"{load.took_ms:.1f} ms, {load.blocks_from_dram} blocks from dram, {load.blocks_from_ssd} from ssd"
            )
        if lookup.loads_more:
            say(f"  and {lookup.loads_more} more loads")
        if lookup.HasField("miss"):
            say(f"  the rest was a miss, for block {lookup.miss.key.hex()}:")
            say(f"  {reasons.miss(lookup.miss, lookup.other_layouts)}")
            if lookup.miss.HasField("stored_since"):
                say(f"  it is stored since {output.when(lookup.miss.stored_since)}")
    if request.lookups_more:
        say(f"and {request.lookups_more} more lookups")
    for each in request.reports:
        _print_report(each, console)
    if request.reports_more:
        say(f"and {request.reports_more} more reports")


_MOVED = {"in_place": "in place", "cuda_ipc": "by CUDA IPC"}  # By the path of a load.
_OUTCOMES = {
    blocks_pb2.REQUEST_OUTCOME_DONE: "as planned",
    blocks_pb2.REQUEST_OUTCOME_MISS: "nothing was stored, everything was computed",
    blocks_pb2.REQUEST_OUTCOME_FAILED_OVER: "the load failed, the history was computed instead",
    blocks_pb2.REQUEST_OUTCOME_BREAKER_OPEN: "the daemon was not asked, the circuit breaker was open",
}


def _print_report(explained: pb.ExplainedReport, console: Console) -> None:
    def say(line: str) -> None:
        console.print(line, markup=False)

    report = explained.report
    how = _OUTCOMES.get(report.outcome, f"outcome {report.outcome}")
    say(f"report of a request that began at {output.when(explained.at)}, by {report.client_name or 'a client'}:")
    say(f"  {how}{': ' if report.outcome_reason else ''}{report.outcome_reason}")
    if report.plan_reason:
        say(f"  {report.plan_reason}")
    loaded = f"{report.loaded_tokens} loaded"
    if report.loaded_bytes:
        loaded += f" ({output.size(report.loaded_bytes)} from {report.tier or '?'} by {report.transport or '?'})"
    say(
        f"  history of {report.history_tokens} tokens: {loaded}, {report.computed_tokens} computed; "
        f"{report.new_tokens} new tokens"
    )
    expected = {name.removesuffix("_ms"): value for name, value in output.plain(report.estimates).items()}
    chosen = output.enum_name(blocks_pb2.RequestPlan.DESCRIPTOR, report.plan)
    first_token_ms = output.plain(report.times)["first_token_ms"]
    if report.plan:
        table = output.table("  plan", "expected", "took", right=("expected", "took"))
        for plan, expected_ms in expected.items():
            table.add_row(f"  {plan}", _ms(expected_ms), _ms(first_token_ms) if plan == chosen else "")
        console.print(table)
    elif first_token_ms is not None:
        say(f"  the first token took {_ms(first_token_ms)}")
    parts = {name: value for name, value in output.plain(report.times).items() if value is not None}
    parts.pop("first_token_ms", None)
    if parts:
        named = (f"{name.removesuffix('_ms').replace('_', ' ')} {_ms(value)}" for name, value in parts.items())
        say(f"  of that: {', '.join(named)}")


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"
