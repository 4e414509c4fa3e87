"""The SSD's channel: the priorities of transfers, and the limit of its bandwidth."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.simulate.ssd_channel import DEFERRED_LIMIT_S, PRESSING_S, SsdChannel

SIZES = {row: 1 + 3 * row for row in range(6)}
#: So no act comes at the very end of a transfer, where rounding would decide what is first.
_QUARTER_S = 0.2501


class Log:
    """Receives the channel's callbacks. A read of an odd row defers a write to free space."""

    def __init__(self) -> None:
        self.channel: SsdChannel | Plain
        self.noted: list[tuple[str, int, int, float]] = []

    def begin_read(self, row: int, now_s: float) -> int:
        self.noted.append(("begin read", row, SIZES[row], now_s))
        if row % 2:
            self.channel.defer_write(row)
        return SIZES[row]

    def end_read(self, row: int, size_bytes: int, now_s: float) -> None:
        self.noted.append(("end read", row, size_bytes, now_s))

    def begin_write(self, row: int, now_s: float) -> int:
        self.noted.append(("begin write", row, SIZES[row], now_s))
        return SIZES[row]

    def end_write(self, row: int, size_bytes: int, now_s: float) -> None:
        self.noted.append(("end write", row, size_bytes, now_s))


def channel_of(log: Log, bytes_per_s: float = 1.0) -> SsdChannel:
    log.channel = channel = SsdChannel(bytes_per_s, log)
    return channel


class Plain:
    """The same channel, event by event and with one byte per second: the first waiting transfer gets it,
    and deferred writes a fifth beside reads while many wait."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.now_s = 0.0
        self.demands: list[float] = []
        self.owed = 0.0
        self.reads: dict[int, float] = {}  # Deadlines.
        self.left: dict[int, float] = {}
        self.writes: list[int] = []
        self.writing: tuple[int, float] | None = None

    def advance(self, now_s: float) -> None:
        while self.now_s < now_s and self._step(now_s):
            pass
        self.now_s = now_s

    def _step(self, now_s: float) -> bool:
        most = now_s - self.now_s
        if self.demands:
            step = min(most, self.demands[0])
            self.demands[0] -= step
            self.now_s += step
            if not self.demands[0]:
                del self.demands[0]
        elif self.reads:
            row = min(self.reads, key=lambda row: (self.reads[row], row))
            if row not in self.left:
                self.left[row] = self.log.begin_read(row, self.now_s)
                return True
            read_share = 1 - 0.2 if self.owed > PRESSING_S else 1.0
            step = min(most, self.left[row] / read_share)
            if read_share < 1:
                shared_s = (self.owed - PRESSING_S) / 0.2
                step = min(step, shared_s)
                self.owed = PRESSING_S if step == shared_s else self.owed - step * 0.2
            ends = step == self.left[row] / read_share
            self.left[row] -= step * read_share
            self.now_s += step
            if ends:
                del self.left[row], self.reads[row]
                self.log.end_read(row, SIZES[row], self.now_s)
        elif self.owed:
            step = min(most, self.owed)
            self.owed -= step
            self.now_s += step
        elif self.writing:
            row, left = self.writing
            step = min(most, left)
            self.now_s += step
            self.writing = (row, left - step)
            if step == left:
                self.writing = None
                self.log.end_write(row, SIZES[row], self.now_s)
        elif self.writes:
            row = self.writes.pop(0)
            self.writing = (row, self.log.begin_write(row, self.now_s))
        else:
            return False
        return True

    def defer_write(self, size_bytes: int) -> None:
        self.owed += size_bytes

    def read_now(self, size_bytes: int) -> None:
        write_s = min(size_bytes * (0.2 / (1 - 0.2)), self.owed) if self.owed > PRESSING_S else 0.0
        self.owed -= write_s
        self.demands.append(size_bytes + write_s)


class Act(NamedTuple):
    after_s: float
    what: str
    row: int
    deadline_s: int


acts = st.lists(
    st.builds(
        Act,
        st.integers(0, 24).map(lambda quarters: quarters * _QUARTER_S),
        st.sampled_from(["read_now", "defer_write", "promote", "promote", "cancel", "write", "write"]),
        st.sampled_from(sorted(SIZES)),
        st.integers(0, 50),
    ),
    max_size=30,
)


@given(acts)
def test_what_is_worked_out_late_is_what_happens_event_by_event(acts: list[Act]) -> None:
    lazy_log, plain_log = Log(), Log()
    lazy = channel_of(lazy_log)
    plain_log.channel = plain = Plain(plain_log)
    now_s = 0.0
    for act in acts:
        now_s += act.after_s
        plain.advance(now_s)
        if act.what == "read_now":
            lazy.advance(now_s)
            plain.read_now(SIZES[act.row])
            assert lazy.read_now(SIZES[act.row]) == pytest.approx(now_s + sum(plain.demands))
        elif act.what == "defer_write":
            lazy.advance(now_s)
            lazy.defer_write(act.row)
            plain.defer_write(act.row)
        elif act.what == "promote":
            lazy.advance(now_s)
            lazy.promote(act.row, act.deadline_s, SIZES[act.row])
            plain.reads[act.row] = act.deadline_s
        elif act.what == "cancel":
            lazy.advance(now_s)
            assert (act.row in lazy.deadlines) == (act.row in plain.reads)
            if act.row in plain.reads:
                begun = act.row in plain.left
                left = plain.left.pop(act.row, 0.0)
                del plain.reads[act.row]
                done = SIZES[act.row] - math.ceil(left) if begun else 0
                assert lazy.cancel(act.row) == (done, SIZES[act.row] if begun else 0)
        else:
            lazy.advance(now_s)
            lazy.write(act.row)
            plain.writes.append(act.row)
        backlog_s = sum(plain.demands) + sum(plain.left.get(row, SIZES[row]) for row in plain.reads)
        assert lazy.read_backlog_s() == pytest.approx(backlog_s)
    lazy.advance(now_s + 1000)
    plain.advance(now_s + 1000)
    for lazily, plainly in zip(lazy_log.noted, plain_log.noted, strict=True):
        assert lazily[:3] == plainly[:3]
        assert lazily[3] == pytest.approx(plainly[3])


@pytest.mark.parametrize("slices", [1, 7, 1000])
def test_while_many_bytes_wait_to_be_written_reads_leave_them_a_fifth(slices: int) -> None:
    log = Log()
    channel = channel_of(log)
    channel.defer_write(8)
    channel.promote(3, 0.0, SIZES[3])
    for number in range(slices):
        channel.advance(100.0 * (number + 1) / slices)
        if number == slices // 2:
            assert channel.can_defer_write(10)
    begins, ends = log.noted
    assert begins[-1] == 0.0
    assert ends[-1] == pytest.approx(SIZES[3] + min(8 - PRESSING_S, SIZES[3] / 4))


def test_a_read_that_a_request_waits_for_takes_a_quarter_longer_while_many_bytes_wait_to_be_written() -> None:
    channel = channel_of(Log())
    channel.defer_write(8)
    assert channel.read_now(4) == 5.0
    channel.advance(5.0)
    assert channel.can_defer_write(3) and not channel.can_defer_write(4), "one second of writes was between"


@given(acts, st.sampled_from([0.5, 3.0, 7.0]))
def test_it_never_gives_more_bytes_than_its_rate_times_the_time(acts: list[Act], rate: float) -> None:
    log = Log()
    channel = channel_of(log, rate)
    now_s = 0.0
    demanded: list[tuple[float, int]] = []
    for act in acts:
        now_s += act.after_s
        channel.advance(now_s)
        if act.what == "read_now":
            demanded.append((channel.read_now(SIZES[act.row]), SIZES[act.row]))
        elif act.what == "promote":
            channel.promote(act.row, act.deadline_s, SIZES[act.row])
        elif act.what == "write":
            channel.write(act.row)
        ended = sum(size for what, _, size, _ in log.noted if what.startswith("end"))
        waited_for = sum(size for at_s, size in demanded if at_s <= now_s)
        assert ended + waited_for <= rate * now_s + 1e-6


def test_a_demand_interrupts_a_promotion_which_keeps_what_it_has_done() -> None:
    log = Log()
    channel = channel_of(log)
    channel.promote(5, 100.0, 16)
    channel.advance(10.0)

    assert channel.read_now(4) == 14.0

    channel.advance(100.0)
    assert log.noted[-1] == ("end read", 5, 16, 20.0)  # Its own, and the four.
    assert channel.read_s == 20.0


def test_the_earlier_deadline_is_read_first_and_a_deadline_may_change() -> None:
    log = Log()
    channel = channel_of(log)
    for row, deadline_s in ((0, 30.0), (2, 20.0), (4, 10.0)):
        channel.promote(row, deadline_s, SIZES[row])
    channel.promote(0, 5.0, SIZES[0])
    channel.advance(100.0)
    assert [row for what, row, _, _ in log.noted if what == "end read"] == [0, 4, 2]


def test_what_is_owed_waits_for_promotions_and_goes_before_write_behind() -> None:
    log = Log()
    channel = channel_of(log)
    channel.write(2)
    channel.advance(3.0)
    channel.defer_write(5)
    channel.promote(4, 1000.0, SIZES[4])
    channel.advance(100.0)
    assert log.noted[-2:] == [("end read", 4, 13, 16.0), ("end write", 2, 7, 25.0)]


def test_write_behind_waits_for_every_read() -> None:
    log = Log()
    channel = channel_of(log)
    channel.write(2)
    channel.advance(3.0)
    channel.promote(4, 1000.0, SIZES[4])
    channel.advance(100.0)
    assert log.noted[-2:] == [("end read", 4, 13, 16.0), ("end write", 2, 7, 20.0)]


def test_only_so_much_may_wait_to_be_written_without_a_place() -> None:
    channel = channel_of(Log())
    channel.defer_write(int(DEFERRED_LIMIT_S) - 1)
    assert channel.can_defer_write(1)
    assert not channel.can_defer_write(2)
    channel.advance(5.0)
    assert channel.can_defer_write(6)
