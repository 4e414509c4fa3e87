"""Real stores for unit tests, and tests that run with the C extension and without it.

Sizes and settings of a store are the test's: ``store_files(dram_bytes=...)``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvservice.store.leases import Client
from kvservice_api import copying
from tests.stores import CALLER, LAYOUT, OpenStore, StoreFiles


@pytest.fixture
def store_files(tmp_path: Path) -> Iterator[Callable[..., StoreFiles]]:
    made: list[StoreFiles] = []

    def make(**settings: Any) -> StoreFiles:
        folder = tmp_path / f"store-{len(made)}"
        folder.mkdir()
        made.append(StoreFiles(folder, **settings))
        return made[-1]

    yield make
    for files in made:
        files.remove()


@pytest.fixture
async def open_store(store_files: Callable[..., StoreFiles]) -> AsyncIterator[Callable[..., Any]]:
    """Opens a store with these settings, and knows the tests' layout. Closed in the end."""
    opened: list[OpenStore] = []

    async def make(**settings: Any) -> OpenStore:
        opened.append(store_files(**settings).open())
        await opened[-1].store.layouts.open(CALLER, LAYOUT)
        return opened[-1]

    yield make
    for each in opened:
        await each.close()


@pytest.fixture
async def opened(open_store: Callable[..., Any]) -> OpenStore:
    """A store with space for 80 blocks in DRAM and 300 on SSD."""
    store: OpenStore = await open_store()
    return store


@pytest.fixture
def client(opened: OpenStore) -> Client:
    return opened.store.leases.attach(CALLER, "test")


@pytest.fixture(params=["native", "pure Python"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs with the C extension, and without it."""
    if request.param == "pure Python":
        monkeypatch.setattr(copying, "native", None)
    elif copying.native is None:
        pytest.skip("the C extension is not built here")
    assert copying.implementation().startswith(request.param)
    return str(request.param)
