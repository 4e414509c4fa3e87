"""TransferTickets of the bulk port: one use, a short time, one client."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from kvservice.bulk.tickets import TicketRefused, TransferTickets


@dataclass(eq=False)
class Owner:
    client_id: bytes = b"a" * 16
    certificate: bytes = b""


def use(tickets: TransferTickets[Owner], ticket: bytes, *, by: Owner, at_s: float = 0.0) -> tuple[Owner, int]:
    return tickets.use(ticket, by.client_id, by.certificate, at_s)


def why(tickets: TransferTickets[Owner], ticket: bytes, *, by: Owner, at_s: float = 0.0) -> str:
    with pytest.raises(TicketRefused) as caught:
        use(tickets, ticket, by=by, at_s=at_s)
    return caught.value.reason


def test_a_ticket_is_of_its_number_and_for_one_use() -> None:
    tickets, owner = TransferTickets[Owner](), Owner()
    issued = tickets.issue(owner, 3, expires_s=10.0)
    assert len(set(issued)) == 3
    assert use(tickets, issued[1], by=owner) == (owner, 1)
    assert why(tickets, issued[1], by=owner) == "used"
    assert use(tickets, issued[0], by=owner) == (owner, 0)


def test_a_ticket_ends_with_its_time() -> None:
    tickets, owner = TransferTickets[Owner](), Owner()
    first, second = tickets.issue(owner, 2, expires_s=10.0)
    assert use(tickets, first, by=owner, at_s=9.9) == (owner, 0)
    assert why(tickets, second, by=owner, at_s=10.0) == "expired"


def test_tickets_that_are_never_brought_are_dropped() -> None:
    tickets, owner = TransferTickets[Owner](), Owner()
    (ticket,) = tickets.issue(owner, 1, expires_s=10.0)
    assert tickets.expire(9.0) == []
    assert tickets.expire(10.0) == [owner]
    assert tickets.open_count == 0
    assert why(tickets, ticket, by=owner) == "expired"


def test_a_transfer_expires_once_and_only_if_none_of_its_tickets_was_used() -> None:
    tickets, joined, unjoined = TransferTickets[Owner](), Owner(), Owner()
    first, _ = tickets.issue(joined, 2, expires_s=10.0)
    tickets.issue(unjoined, 2, expires_s=10.0)
    use(tickets, first, by=joined, at_s=9.9)
    assert tickets.expire(10.0) == [unjoined]
    assert tickets.open_count == 0


def test_another_client_or_certificate_is_refused_and_does_not_use_the_ticket_up() -> None:
    tickets, owner = TransferTickets[Owner](), Owner(certificate=b"c" * 32)
    (ticket,) = tickets.issue(owner, 1, expires_s=10.0)
    for stranger in (Owner(b"b" * 16, owner.certificate), Owner(certificate=b"d" * 32), Owner()):
        assert why(tickets, ticket, by=stranger) == "foreign"
    assert use(tickets, ticket, by=owner) == (owner, 0)


def test_an_invented_ticket_is_unknown() -> None:
    tickets = TransferTickets[Owner]()
    tickets.issue(owner := Owner(), 1, 10.0)
    assert why(tickets, bytes(32), by=owner) == "unknown"


def test_few_ended_tickets_are_remembered() -> None:
    tickets, owner = TransferTickets[Owner](), Owner()
    (first,) = tickets.issue(owner, 1, 10.0)
    use(tickets, first, by=owner)
    for _ in range(300):
        tickets.issue(owner, 16, 1.0)
        tickets.expire(1.0)
    assert why(tickets, first, by=owner) == "unknown"


def test_offers_are_few_and_push_out_no_ticket_that_was_asked_for() -> None:
    tickets, owner = TransferTickets[Owner](), Owner()
    asked_for = tickets.issue(owner, 1, 10.0)
    first, second = tickets.issue(owner, 2, 10.0, is_offer=True), tickets.issue(owner, 2, 10.0, is_offer=True)
    assert use(tickets, first[0], by=owner) == (owner, 0)
    last = [tickets.issue(owner, 2, 10.0, is_offer=True) for _ in range(1023)][-1]
    assert tickets.open_count == 1 + 2 * 1024
    assert [why(tickets, each, by=owner) for each in first] == ["used", "expired"]
    for each in asked_for, second, last:
        use(tickets, each[0], by=owner)


class OtherOwner(Owner):
    """A transfer of another kind."""


def test_offers_of_another_kind_do_not_end_an_offer() -> None:
    tickets, owner, other = TransferTickets[Owner](), Owner(), OtherOwner()
    (offered,) = tickets.issue(owner, 1, 10.0, is_offer=True)
    for _ in range(1100):
        tickets.issue(other, 1, 10.0, is_offer=True)
    assert use(tickets, offered, by=owner) == (owner, 0)
