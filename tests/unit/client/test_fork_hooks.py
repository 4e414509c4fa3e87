"""What is registered for forks is reset in the child and never in the parent, and a block may hold forks off."""

from __future__ import annotations

import os
import threading

import pytest

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
