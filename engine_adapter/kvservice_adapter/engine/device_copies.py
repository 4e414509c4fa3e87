"""Copies that the daemon makes itself, between its memory and an engine's pages.

Each raises an error of `NEXT_TRANSPORT` where another transport must do it, or do the rest of it.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

from kvservice_adapter.device.base import Event
from kvservice_adapter.layer_source import PagesOfLayer
from kvservice_api.errors import DeviceUnavailable, InvalidRequest, NotShared, Overloaded, RegistrationEnded
from kvservice_client import Lease
from kvservice_client.device_memory import DeviceMemory, LoadPlace, WriteFence

NEXT_TRANSPORT = (DeviceUnavailable, RegistrationEnded, NotShared, Overloaded, InvalidRequest)


class Copied(Event):
    """Of a layer that the daemon has copied: it says so once the copy is done on the GPU."""

    is_done, error = True, None

    def wait(self, timeout_s: float) -> bool:
        return True


def copied_layers(
    memory: DeviceMemory,
    fence: WriteFence,
    lease: Lease,
    blocks: range,
    pages_of_layer: PagesOfLayer,
    *,
    layer_s: float,
    idle_s: float,
) -> Generator[int, None, None]:
    """The numbers of layers whose blocks the daemon has copied into the pages, in order.

    The engine has computed what it was given before. Once it has ended, or is closed, or the fence has ended, nothing
    is written to the pages any more. Raises as `Lease.copy_to`.
    """
    groups = memory.groups
    pages = [pages_of_layer(groups.index(group)) for group in range(max(groups) + 1)]
    first, tokens = pages[0].first_token, sum(lease.token_counts[blocks.start : blocks.stop])
    copied = [each.copied or (0, tokens) for each in pages]
    place = LoadPlace(
        first,
        [each.page_ids for each in pages],
        [first + begin for begin, _ in copied],
        first + max(end for _, end in copied),
    )
    layers = lease.copy_to(
        memory, place, fence, blocks.start, len(blocks), layer_timeout_s=layer_s, idle_timeout_s=idle_s
    )
    with closing(layers):
        yield from layers
