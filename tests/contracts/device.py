"""What every device promises. Subclass it, provide `device`, `place` and `read`, inherit the specification."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvservice_adapter.device.base import Computed, Device, NotOrdered, Pages, StreamClosed
from kvservice_adapter.device.rotation import Rotation, Stretch
from kvservice_client.buffers import Bytes

HEADS, K_DIM, V_DIM = 2, 8, 4
WAIT_S = 60.0
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


def noise(size_bytes: int, seed: int = 0) -> Bytes:
    """Random bits, with NaNs among them."""
    return np.random.default_rng(seed).integers(0, 256, size_bytes, np.uint8)


def pages_of(
    page_count: int,
    page_tokens: int,
    page_ids: Sequence[int],
    first_token: int = 0,
    *,
    place: Callable[[torch.Tensor], Any] = lambda tensor: tensor,
    dtype: torch.dtype = torch.float32,
) -> Pages:
    """Pages full of ones, where `place` puts a tensor."""
    keys = torch.ones(page_count, HEADS, page_tokens, K_DIM).to(dtype)
    values = torch.ones(page_count, HEADS, page_tokens, V_DIM).to(dtype)
    return Pages(place(keys), place(values), page_ids, first_token, name_of(dtype))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def stored_token(
    slices: Bytes, token_counts: Sequence[int], token: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Keys and values of one token in the stored form: block after block, each ``[K, V][head][token][dim]``."""
    elements = torch.from_numpy(slices).view(dtype)
    start = 0
    for count in token_counts:
        size = count * HEADS * (K_DIM + V_DIM)
        if token < count:
            keys = elements[start : start + count * HEADS * K_DIM].view(HEADS, count, K_DIM)
            values = elements[start + count * HEADS * K_DIM : start + size].view(HEADS, count, V_DIM)
            return keys[:, token], values[:, token]
        token, start = token - count, start + size
    raise IndexError(token)


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))


def holding(gate: threading.Event) -> Callable[[], None]:
    """Work that runs until the gate is open."""

    def work() -> None:
        assert gate.wait(WAIT_S)

    return work


def numbering(tokens: int, dim: int = K_DIM) -> Rotation:
    """A rotation with a known result: keys of ones become the number of their token in the run, plus one."""
    numbers = np.arange(1, tokens + 1, dtype=np.float32)[:, None].repeat(dim // 2, 1)
    return Rotation((Stretch(0, tokens, numbers, np.zeros_like(numbers)),))


class DeviceContract:
    """The arrays of an engine are made by `place` and `read`: here they are the tensors themselves."""

    def place(self, tensor: torch.Tensor) -> Any:
        """An array with the bits of a tensor, where the device's engine has its pages."""
        return tensor

    def read(self, array: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The elements of an array that `place` made, or of a part of it, once the engine has computed all it was
        given.
        """
        assert isinstance(array, torch.Tensor)
        return array

    def read_token(self, pages: Pages, token: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
        """Keys and values of one token of the run, ``[head, dim]``, by the definition of `Pages`."""
        page, at = divmod(pages.first_token + token, pages.page_tokens)
        page_id = pages.page_ids[page]
        return self.read(pages.keys, dtype)[page_id, :, at], self.read(pages.values, dtype)[page_id, :, at]

    # Streams and events

    def test_work_is_done_in_the_order_in_which_it_was_given(self, device: Device) -> None:
        stream, done = device.stream("test"), list[int]()

        events = [stream.submit(partial(done.append, number)) for number in range(100)]

        assert events[-1].wait(WAIT_S)
        assert done == list(range(100))
        assert all(event.is_done and event.error is None for event in events)

    def test_giving_work_waits_for_nothing_and_so_does_another_stream(self, device: Device) -> None:
        stream, other, gate = device.stream("test"), device.stream("other"), threading.Event()
        slices = noise(5 * HEADS * (K_DIM + V_DIM) * 4)

        held = stream.submit(holding(gate))
        copied = stream.scatter(slices, [5], pages_of(1, 5, [0], place=self.place))

        assert other.submit(lambda: None).wait(WAIT_S)
        assert not held.is_done
        assert not copied.is_done
        gate.set()
        assert copied.wait(WAIT_S)

    def test_a_wait_ends_with_its_time(self, device: Device) -> None:
        gate = threading.Event()
        event = device.stream("test").submit(holding(gate))

        assert not event.wait(0.0)
        assert not event.wait(0.01)
        gate.set()
        assert event.wait(WAIT_S)

    def test_what_work_raises_is_in_its_event_and_later_work_is_done_all_the_same(self, device: Device) -> None:
        stream, error = device.stream("test"), KeyError("gone")

        def fail() -> None:
            raise error

        failed, later = stream.submit(fail), stream.submit(lambda: None)

        assert later.wait(WAIT_S)
        assert failed.is_done
        assert failed.error is error
        assert later.error is None

    def test_the_engines_computing_waits_for_an_event(self, device: Device) -> None:
        stream, slices = device.stream("test"), noise(300 * HEADS * (K_DIM + V_DIM) * 4)
        pages = pages_of(1, 300, [0], place=self.place)

        event = stream.scatter(slices, [30] * 10, pages)

        assert device.wait_in_compute(event, WAIT_S)
        computed = self.read(pages.keys).clone()  # Queued behind the copy, on a device with a queue.
        assert same_bits(computed[0, :, 299], stored_token(slices, [30] * 10, 299, torch.float32)[0])

    def test_what_the_engine_has_computed_before_is_gathered(self, device: Device) -> None:
        stream, back = device.stream("test"), np.zeros(300 * HEADS * (K_DIM + V_DIM) * 4, np.uint8)
        pages = pages_of(1, 300, [0], place=self.place)
        pages.keys[...], pages.values[...] = 0, 0

        stream.after(device.computed())
        event = stream.gather(pages, [30] * 10, back)
        assert event.wait(WAIT_S)

        assert event.error is None
        assert not back.any()

    def test_a_stream_waits_for_nothing_that_it_cannot_wait_for(self, device: Device) -> None:
        with pytest.raises(NotOrdered, match="a graph"):
            device.stream("test").after(Computed("a graph is captured"))

    def test_work_that_waits_for_no_copy_is_done_in_order_all_the_same(self, device: Device) -> None:
        stream, slices, done = device.stream("test"), noise(300 * HEADS * (K_DIM + V_DIM) * 4), list[int]()

        copied = stream.scatter(slices, [30] * 10, pages_of(1, 300, [0], place=self.place))
        early, late = stream.submit(partial(done.append, 1), waits=False), stream.submit(partial(done.append, 2))

        assert late.wait(WAIT_S)
        assert early.is_done
        assert copied.is_done
        assert done == [1, 2]

    def test_a_closed_stream_does_what_it_was_given_and_takes_no_more(self, device: Device) -> None:
        stream, gate = device.stream("test"), threading.Event()
        held, given = stream.submit(holding(gate)), stream.submit(lambda: None)

        stream.close()

        with pytest.raises(StreamClosed):
            stream.submit(lambda: None)
        gate.set()
        assert given.wait(WAIT_S)
        assert held.error is given.error is None

    # Between stored slices and an engine's pages

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_bit_of_a_slice_goes_into_the_pages_and_back(self, device: Device, dtype: torch.dtype) -> None:
        stream, counts = device.stream("test"), [16, 16, 16, 5]
        slices = noise(sum(counts) * HEADS * (K_DIM + V_DIM) * dtype.itemsize)
        pages, back = pages_of(6, 16, [4, 0, 5, 2], 7, place=self.place, dtype=dtype), np.zeros_like(slices)

        stream.scatter(slices, counts, pages)
        event = stream.gather(pages, counts, back)

        assert event.wait(WAIT_S)
        assert event.error is None
        for token in (0, 8, 9, 31, 32, 52):
            for ours, theirs in zip(
                self.read_token(pages, token, dtype), stored_token(slices, counts, token, dtype), strict=True
            ):
                assert same_bits(ours, theirs), token
        assert np.array_equal(back, slices)

    @settings(
        suppress_health_check=[
            HealthCheck.differing_executors,
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
        ],
    )
    @given(
        counts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
        page_tokens=st.integers(1, 40),
        first_token=st.integers(0, 20),
        ends=st.tuples(st.integers(0, 50), st.integers(0, 50)),
    )
    def test_tokens_that_are_not_copied_keep_their_place_as_it_is(
        self, device: Device, counts: list[int], page_tokens: int, first_token: int, ends: tuple[int, int]
    ) -> None:
        """The pages need not hold what is after the copied tokens. Each block is in an array of its own."""
        tokens = sum(counts)
        begin, end = sorted(min(each, tokens) for each in ends)
        page_ids = list(range(-(-(first_token + max(end, 1)) // page_tokens)))
        whole = pages_of(len(page_ids), page_tokens, page_ids, first_token, place=self.place)
        pages = Pages(whole.keys, whole.values, page_ids, first_token, whole.dtype, (begin, end))
        ones = [self.place(torch.ones(self.read(each).shape)) for each in (whole.keys, whole.values)]
        slices = np.random.default_rng(1).random(tokens * HEADS * (K_DIM + V_DIM), np.float32).view(np.uint8)
        edges = [0, *(sum(counts[: each + 1]) * HEADS * (K_DIM + V_DIM) * 4 for each in range(len(counts)))]
        blocks = [slices[first:last] for first, last in pairwise(edges)]
        halves = [np.split(each, [each.size * K_DIM // (K_DIM + V_DIM)]) for each in blocks]

        for given_slices in (slices, blocks, halves):
            whole.keys[...], whole.values[...] = ones
            stream = device.stream("test")
            stream.after(device.computed())
            event = stream.scatter(given_slices, counts, pages)
            assert event.wait(WAIT_S)
            assert event.error is None
            untouched = torch.ones(HEADS, K_DIM), torch.ones(HEADS, V_DIM)
            for token in range(min(tokens, len(page_ids) * page_tokens - first_token)):
                expected = stored_token(slices, counts, token, torch.float32) if begin <= token < end else untouched
                for ours, theirs in zip(self.read_token(pages, token), expected, strict=True):
                    assert same_bits(ours, theirs), token

    @settings(
        suppress_health_check=[  # Several devices inherit it.
            HealthCheck.differing_executors,
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
        ],
    )
    @given(
        counts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
        page_tokens=st.integers(1, 40),
        first_token=st.integers(0, 20),
        shuffle=st.randoms(use_true_random=False),
    )
    def test_each_token_is_where_the_pages_say_for_every_page_size(
        self, device: Device, counts: list[int], page_tokens: int, first_token: int, shuffle: random.Random
    ) -> None:
        page_count = -(-(first_token + sum(counts)) // page_tokens)
        page_ids = list(range(page_count + 1))
        shuffle.shuffle(page_ids)
        pages = pages_of(page_count + 1, page_tokens, page_ids, first_token, place=self.place)
        slices = np.random.default_rng(1).random(sum(counts) * HEADS * (K_DIM + V_DIM), np.float32).view(np.uint8)
        stream, back = device.stream("test"), np.zeros_like(slices)

        stream.scatter(slices, counts, pages)
        event = stream.gather(pages, counts, back)

        assert event.wait(WAIT_S)
        assert event.error is None
        for token in range(sum(counts)):
            for ours, theirs in zip(
                self.read_token(pages, token), stored_token(slices, counts, token, torch.float32), strict=True
            ):
                assert torch.equal(ours, theirs), token
        beside = (page_count + 1) * page_tokens - sum(counts)
        assert int((self.read(pages.keys) == 1).sum()) == beside * HEADS * K_DIM  # Random numbers stay below it.
        assert int((self.read(pages.values) == 1).sum()) == beside * HEADS * V_DIM
        assert np.array_equal(back, slices)
        stream.close()

    def test_the_tensors_may_have_any_strides(self, device: Device) -> None:
        stream, counts = device.stream("test"), [4, 4, 3]
        slices, back = noise(11 * HEADS * (K_DIM + V_DIM) * 4), np.zeros(11 * HEADS * (K_DIM + V_DIM) * 4, np.uint8)
        # [K, V][page][token][head][dim], as some engines have them, every other one left out.
        memory = self.place(torch.zeros(2, 8, 4, HEADS, K_DIM))
        keys, values = memory[0, ::2].swapaxes(1, 2), memory[1, ::2, :, :, :V_DIM].swapaxes(1, 2)
        pages = Pages(keys, values, [3, 1, 0], dtype="float32")

        stream.scatter(slices, counts, pages)
        event = stream.gather(pages, counts, back)

        assert event.wait(WAIT_S)
        assert event.error is None
        found = self.read(memory)
        assert same_bits(found[0, 0, 2], stored_token(slices, counts, 10, torch.float32)[0])
        assert np.array_equal(back, slices)
        assert not found[:, 1::2].any()

    @pytest.mark.parametrize("is_joined", [True, False])
    @pytest.mark.parametrize(("page_tokens", "page_ids"), [(64, [1]), (16, [3, 1, 2]), (5, [2, 3, 7, 1, 9, 4, 5])])
    def test_each_block_is_reported_in_order_once_it_is_gathered(
        self, device: Device, page_tokens: int, page_ids: list[int], is_joined: bool
    ) -> None:
        stream, counts = device.stream("test"), [8, 8, 8, 3]
        token_bytes = HEADS * (K_DIM + V_DIM) * 4
        slices = np.arange(27 * token_bytes // 4, dtype=np.float32).view(np.uint8)
        ends = np.cumsum(counts) * token_bytes
        pages = pages_of(10, page_tokens, page_ids, 2, place=self.place)
        stream.scatter(slices, counts, pages)
        joined, seen = np.zeros_like(slices), []
        into = joined if is_joined else np.split(joined, ends[:-1])

        event = stream.gather(pages, counts, into, lambda block: seen.append((block, joined[: ends[block]].copy())))

        assert event.wait(WAIT_S)
        assert event.error is None
        assert [block for block, _ in seen] == [0, 1, 2, 3]
        assert all(np.array_equal(found, slices[: len(found)]) for _, found in seen)

    def test_what_the_report_of_a_block_raises_is_the_error_of_the_gathering(self, device: Device) -> None:
        def refuse(block: int) -> None:
            raise InterruptedError("no more")

        stream, slices = device.stream("test"), np.zeros(8 * HEADS * (K_DIM + V_DIM) * 4, np.uint8)
        event = stream.gather(pages_of(2, 8, [1], 0, place=self.place), [8], slices, refuse)
        assert event.wait(WAIT_S)
        assert isinstance(event.error, InterruptedError)

    @pytest.mark.parametrize(("page_tokens", "page_ids"), [(64, [1]), (16, [3, 1, 2]), (5, [2, 3, 7, 1, 9, 4, 5])])
    def test_a_rotation_turns_each_key_once_by_its_place_in_the_run(
        self, device: Device, page_tokens: int, page_ids: list[int]
    ) -> None:
        stream, counts = device.stream("test"), [8, 8, 8, 3]
        slices = np.ones(27 * HEADS * (K_DIM + V_DIM), np.float32).view(np.uint8)
        pages = pages_of(10, page_tokens, page_ids, 2, place=self.place)

        event = stream.scatter(slices, counts, pages, numbering(27))

        assert event.wait(WAIT_S)
        assert event.error is None
        for token in range(27):
            keys, values = self.read_token(pages, token)
            assert torch.all(keys == token + 1), token
            assert torch.all(values == 1), token
        assert np.all(slices.view(np.float32) == 1)

    @pytest.mark.parametrize(
        ("size", "counts", "ids", "first"),
        [(9, [4, 4], [0], 0), (8, [4, 4], [0], 1), (8, [4, 4], [], 0), (8, [4, 4], [0], -1)],
        ids=["too many bytes", "past the last page", "no page", "before the first page"],
    )
    def test_what_does_not_fit_is_an_error_and_nothing_is_written(
        self, device: Device, size: int, counts: list[int], ids: list[int], first: int
    ) -> None:
        stream, slices = device.stream("test"), np.zeros(size * HEADS * (K_DIM + V_DIM) * 4, np.uint8)
        pages = pages_of(2, 8, ids, first, place=self.place)

        scattered, gathered = stream.scatter(slices, counts, pages), stream.gather(pages, counts, slices)

        assert gathered.wait(WAIT_S)
        assert isinstance(scattered.error, ValueError)
        assert isinstance(gathered.error, ValueError)
        assert torch.all(self.read(pages.keys) == 1)
        assert torch.all(self.read(pages.values) == 1)
        assert not slices.any()

    def test_what_is_to_be_done_after_a_copy_is_done_before_its_event_and_its_wait_end(self, device: Device) -> None:
        stream, gate, seen = device.stream("test"), threading.Event(), list[bool]()
        pages = pages_of(1, 8, [0], place=self.place)
        slices = np.zeros(5 * HEADS * (K_DIM + V_DIM) * 4, np.uint8)

        def then() -> None:
            seen.append(bool((self.read(pages.keys)[0, :, :5] == 0).all()))
            assert gate.wait(WAIT_S)

        event = stream.scatter(slices, [5], pages, then=then)

        assert not device.wait_in_compute(event, 0.05)
        assert not event.is_done
        gate.set()
        assert device.wait_in_compute(event, WAIT_S)
        assert (event.is_done, event.error, seen) == (True, None, [True])

    def test_what_it_raises_is_the_copys_error_and_after_a_failed_copy_nothing_is_done(self, device: Device) -> None:
        stream, called = device.stream("test"), list[int]()
        pages = pages_of(1, 8, [0], place=self.place)

        def then() -> None:
            called.append(1)
            raise LookupError("replaced")

        size = 5 * HEADS * (K_DIM + V_DIM) * 4
        replaced = stream.scatter(np.zeros(size, np.uint8), [5], pages, then=then)
        failed = stream.scatter(np.zeros(size - 1, np.uint8), [5], pages, then=then)
        right = stream.scatter(np.zeros(size, np.uint8), [5], pages)

        assert right.wait(WAIT_S)
        assert isinstance(replaced.error, LookupError)
        assert isinstance(failed.error, ValueError)
        assert (right.error, called) == (None, [1])

    def test_keys_and_values_of_other_shapes_are_an_error(self, device: Device) -> None:
        pages = Pages(self.place(torch.zeros(1, 2, 8, 4)), self.place(torch.zeros(1, 3, 8, 4)), [0])

        event = device.stream("test").scatter(np.zeros(8 * 5 * 4 * 4, np.uint8), [8], pages)

        assert event.wait(WAIT_S)
        assert isinstance(event.error, ValueError)

    # Staging

    def test_staging_reserves_at_most_its_size(self, device: Device) -> None:
        staging = device.staging(1 << 20)

        parts = [staging.reserve(256 << 10) for _ in range(5)]

        assert [part is not None for part in parts] == [True, True, True, True, False]
        assert staging.size_bytes == staging.reserved_bytes == 1 << 20
        for number, part in enumerate(parts[:4]):
            assert part is not None
            part.fill(number)
        assert [int(part.min()) for part in parts[:4] if part is not None] == [0, 1, 2, 3]

    def test_released_staging_is_reserved_again_in_any_size(self, device: Device) -> None:
        staging = device.staging(1 << 20)
        parts = [staging.reserve(200_000) for _ in range(5)]

        for number in (3, 0, 4, 2, 1):
            part = parts[number]
            assert part is not None
            staging.release(part)

        assert staging.reserved_bytes == 0
        assert staging.reserve(1 << 20) is not None

    def test_staging_is_released_once(self, device: Device) -> None:
        staging = device.staging(1 << 20)
        part = staging.reserve(10)
        assert part is not None
        staging.release(part)

        with pytest.raises(KeyError):
            staging.release(part)

    def test_no_byte_of_staging_is_reserved_twice_at_one_time(self, device: Device) -> None:
        staging, wrong = device.staging(1 << 20), list[int]()

        def borrow(number: int) -> None:
            sizes = np.random.default_rng(number).integers(1, 300_000, 300)
            for size in sizes.tolist():
                part = staging.reserve(size)
                if part is not None:
                    part.fill(number)
                    if part.min() != number or part.max() != number:
                        wrong.append(number)
                    staging.release(part)

        threads = [threading.Thread(target=borrow, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert not wrong
        assert staging.reserved_bytes == 0
        assert staging.reserve(1 << 20) is not None
