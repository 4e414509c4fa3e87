"""What saves send of their chains: the slices of the caller's buffers, and parts of so many blocks; their results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvservice_api.errors import InvalidRequest
from kvservice_api.keys import BlockChain
from kvservice_api.layout import Layout, Shard
from kvservice_client import arguments
from kvservice_client.buffers import Bytes, Slices, Source, cut, readable
from kvservice_client.transports.base import SaveResult


def checked_save(layout: Layout, chain: BlockChain) -> BlockChain:
    """Raises InvalidRequest for a chain that cannot be saved."""
    if any(count != layout.block_tokens for count in arguments.chain(chain).token_counts[:-1]):
        raise InvalidRequest("only the last block of a save may be partial", field="chain")
    return chain


def slices_of(
    layout: Layout, shard: Shard, chain: BlockChain, layers: Sequence[Source | Sequence[Source]]
) -> list[list[Bytes]]:
    """Flat views, ordered by layer, then by block. Raises InvalidRequest for wrong sizes."""
    if len(arguments.sequence(layers, "layers")) != shard.layers:
        raise InvalidRequest(f"{len(layers)} layers are given; the shard has {shard.layers}", field="layers")
    counts = checked_save(layout, chain).token_counts
    slices = []
    for index, layer in enumerate(layers):
        name = f"layers[{index}]"
        whole = Slices.of(layout, shard, index, counts)
        if not isinstance(layer, (list, tuple)):
            size_of = {count: whole.group.slice_bytes(whole.heads, count) for count in set(counts)}
            slices.append(cut(readable(layer, name, whole), [size_of[count] for count in counts]))
            continue
        if len(layer) != len(counts):
            raise InvalidRequest(f"{name} has {len(layer)} buffers; the chain has {len(counts)} blocks", field=name)
        slices.append(
            [
                readable(each, f"{name}[{block}]", whole._replace(token_counts=counts[block : block + 1]))
                for block, each in enumerate(layer)
            ]
        )
    return slices


def parts_of(chains: Sequence[BlockChain], blocks_max: int, chains_max: int) -> Iterator[list[tuple[int, range]]]:
    """The blocks of all chains in saves of so many: for each part of a chain the chain's number, and the blocks."""
    parts: list[tuple[int, range]] = []
    space = blocks_max
    for number, chain in enumerate(chains):
        first = 0
        while first < len(chain):
            part = range(first, min(first + space, len(chain)))
            parts.append((number, part))
            first, space = part.stop, space - len(part)
            if not space or len(parts) == chains_max:
                yield parts
                parts, space = [], blocks_max
    if parts:
        yield parts


def joined(results: Sequence[SaveResult]) -> SaveResult:
    """The result of a chain, from those of its parts."""
    refused = [each for result in results for each in result.refused]
    return SaveResult(sum(each.stored for each in results), sum(each.already_stored for each in results), refused)
