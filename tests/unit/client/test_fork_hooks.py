"""Registered objects are reset in a forked child and never in the parent, and a block can delay forks."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest

from kvservice_api.cached_property import cached_property
from kvservice_client import forks
from tests.forking import in_child

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


class Counted:
    """Counts its resets. May raise in each."""

    def __init__(self, error: Exception | None = None) -> None:
        self.resets = 0
        self._error = error
        forks.register(self)

    def reset_in_child(self) -> None:
        self.resets += 1
        if self._error is not None:
            raise self._error


def test_an_object_is_reset_once_in_each_child_and_never_in_the_parent() -> None:
    counted, generation = Counted(), forks.generation
    assert in_child(lambda: (counted.resets, forks.generation)) == (1, generation + 1)
    assert in_child(lambda: in_child(lambda: counted.resets)) == 2
    assert (counted.resets, forks.generation) == (0, generation)


def test_an_object_that_cannot_be_reset_does_not_keep_others_from_it() -> None:
    counted = [Counted(OSError("no")), Counted(), Counted(ValueError("no")), Counted()]
    assert in_child(lambda: [each.resets for each in counted]) == [1, 1, 1, 1]


class Lengthy:
    """`size` takes as long as `compute`."""

    def __init__(self, compute: Callable[[], object]) -> None:
        self._compute = compute

    @cached_property
    def size(self) -> int:
        """Of what is computed."""
        self._compute()
        return 7


def test_a_child_computes_a_property_that_a_thread_of_its_parent_was_computing() -> None:
    begun, over = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        over.wait()

    slow, other = Lengthy(wait), Lengthy(lambda: None)
    thread = threading.Thread(target=lambda: slow.size)
    thread.start()
    begun.wait()
    try:
        assert in_child(lambda: other.size) == 7
    finally:
        over.set()
        thread.join()


def test_a_cached_property_is_computed_once_for_each_object() -> None:
    computed = list[int]()
    first, second = Lengthy(lambda: computed.append(1)), Lengthy(lambda: computed.append(2))
    assert [first.size, first.size, second.size, second.size] == [7] * 4
    assert computed == [1, 2]
    assert Lengthy.size.__doc__ == "Of what is computed."


def test_no_thread_forks_while_another_holds_forks_off() -> None:
    held, over, steps = threading.Event(), threading.Event(), []

    def hold() -> None:
        with forks.held_off():
            held.set()
            over.wait()
            steps.append("released")

    def fork() -> None:
        in_child(os.getpid)
        steps.append("forked")

    holding, forking = threading.Thread(target=hold), threading.Thread(target=fork)
    holding.start()
    held.wait()
    forking.start()
    over.set()
    forking.join()
    holding.join()
    assert steps == ["released", "forked"]


def test_the_thread_that_holds_forks_off_may_fork_itself() -> None:
    with forks.held_off():
        assert in_child(os.getpid) != os.getpid()
