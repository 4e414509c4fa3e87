"""One thread for what computes with tiny models, in every test."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """torch computes on one: threads that share work this small mostly wait for each other, and keep cores busy."""
    if torch := sys.modules.get("torch"):  # Whoever computes with it has imported it by now.
        torch.set_num_threads(1)
