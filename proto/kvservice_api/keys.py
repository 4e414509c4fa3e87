"""How tokens become block keys.

A key identifies a block by everything that its KV depends on: the layout, an optional salt (such as
a tenant), all tokens up to the block's end, and other inputs (LoRA, images). The same conversation
therefore finds the same blocks, independent of the engine, host or daemon that stored them::

    root      = SHA-256("kvservice/root/1",  fingerprint, u32 len, salt)
    block key = SHA-256("kvservice/block/1", parent, u32 n, n x u32 token id, u32 len, extra)
    cut key   = SHA-256("kvservice/cut/1",   tip, u32 n, n x (u64 first, u64 count))

After a session was truncated, its chain continues from a cut key. The cut key depends on the whole
history before the cut and on the ranges that were kept. A lookup of an ordinary prefix therefore never
finds the blocks after a cut.

All integers are big-endian. Golden vectors: ``tests/wire/``.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvservice_api.cached_property import cached_property
from kvservice_api.errors import InvalidRequest

if TYPE_CHECKING:
    from kvservice_api.layout import Layout

KEY_BYTES = 32

_ROOT_TAG = b"kvservice/root/1"
_BLOCK_TAG = b"kvservice/block/1"
_CUT_TAG = b"kvservice/cut/1"
_U32 = struct.Struct(">I")
_U32_MAX = 2**32 - 1
_TOKEN_BYTES = 4


def root_key(fingerprint: bytes, salt: bytes = b"") -> bytes:
    """The parent key of a chain's first block, 32 bytes. Chains with different salts share no keys."""
    return hashlib.sha256(_ROOT_TAG + fingerprint + _U32.pack(len(salt)) + salt).digest()


def block_key(parent: bytes, token_ids: ArrayLike, extra: bytes = b"") -> bytes:
    """The key, 32 bytes, of the block that continues `parent` with `token_ids`.

    Raises InvalidRequest if `token_ids` is empty, or if an id is not an integer from 0 to 2**32 - 1.
    """
    tokens = _packed_tokens(token_ids)
    if not tokens:
        raise InvalidRequest("a block needs at least one token", field="token_ids")
    return _block_key(parent, tokens, extra)


def cut_key(tip: bytes, keep: Sequence[tuple[int, int]] | NDArray[np.int64]) -> bytes:
    """The parent key of the next block after a cut that keeps the token ranges `keep`, each (first, count).

    `tip` is the key of the last block before the cut, full or partial: it covers all tokens so far.
    """
    ranges = np.array(keep, ">u8").tobytes()
    return hashlib.sha256(_CUT_TAG + tip + _U32.pack(len(keep)) + ranges).digest()


def kept_ranges(keep: Sequence[tuple[int, int]], token_count: int) -> NDArray[np.int64]:
    """The ranges (first, count) of a cut in the form that `cut_key` takes: adjacent ranges are joined.

    `keep` has ranges of a history of `token_count` tokens. Returns int64 ``[range, 2]``. Raises InvalidRequest for
    ranges that are not ascending, disjoint, not empty and inside the history.
    """
    if any(first < 0 or count < 1 for first, count in keep):
        raise InvalidRequest("a range of keep is empty, or begins before the history", field="keep")
    firsts, counts = np.fromiter(chain.from_iterable(keep), np.uint64, 2 * len(keep)).reshape(-1, 2).T
    total = np.uint64(token_count)
    past = (firsts >= total) | (counts > total - np.minimum(firsts, total))
    if past.any():
        at = int(past.argmax())
        raise InvalidRequest(
            f"keep[{at}] is tokens {keep[at][0]}..{keep[at][0] + keep[at][1]}; the session has {token_count}",
            field="keep",
        )
    ends = firsts + counts
    wrong = np.flatnonzero(firsts[1:] < ends[:-1])
    if len(wrong):
        at = int(wrong[0]) + 1
        what = "descends" if firsts[at] < firsts[at - 1] else "overlaps the one before"
        raise InvalidRequest(f"keep[{at}] {what}: ranges must be ascending and disjoint", field="keep")
    begins = np.flatnonzero(np.append(True, firsts[1:] != ends[:-1])[: len(keep)])
    return np.stack([firsts[begins], np.add.reduceat(counts, begins)], axis=1).astype(np.int64)


def extra_identity(lora_id: str = "", media_hashes: Sequence[bytes] = ()) -> bytes:
    """The canonical encoding of a block's inputs other than tokens; empty without any.

    `media_hashes` are digests of the images, sounds or videos whose placeholders are in the block, in
    their order.
    """
    if not lora_id and not media_hashes:
        return b""
    name = lora_id.encode()
    parts = [_U32.pack(len(name)), name, _U32.pack(len(media_hashes))]
    for digest in media_hashes:
        parts += [_U32.pack(len(digest)), digest]
    return b"".join(parts)


@dataclass(frozen=True)  # Without slots: a cached property needs a place.
class BlockChain:
    """Consecutive blocks of one conversation: each key continues the key before it.

    `parent` is the key that the first block continues: a block key, a root, or a cut key. All blocks except the last
    are full. The history of a session is an exception: it is looked up, and never saved as a whole.
    """

    parent: bytes
    keys: tuple[bytes, ...]
    token_counts: tuple[int, ...]

    def __repr__(self) -> str:
        ends = f", {self.keys[0].hex()} to {self.keys[-1].hex()}" if self.keys else ""
        return f"BlockChain({len(self.keys)} blocks of {sum(self.token_counts)} tokens{ends})"

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.keys)

    def __getitem__(self, blocks: slice) -> BlockChain:
        """A part of the chain. Its parent is the key before its first block."""
        first, last, step = blocks.indices(len(self.keys))
        if step != 1:
            raise ValueError("a part of a chain has no gaps")
        parent = self.keys[first - 1] if first > 0 else self.parent
        return BlockChain(parent, self.keys[first:last], self.token_counts[first:last])

    @property
    def token_count(self) -> int:
        return sum(self.token_counts)

    @cached_property
    def packed_keys(self) -> bytes:
        """The keys one after another, as requests carry them."""
        return b"".join(self.keys)


class ChainBuilder:
    """The keys of a token sequence that grows: each block is hashed once, when its last token is added.

        builder = ChainBuilder(layout)
        builder.extend(prompt_token_ids)
        lease = blocks.lookup(builder.chain)
        builder.extend(new_token_ids)
        blocks.save(builder.chain[lease.hit_blocks :], layers)

    One thread adds tokens; others may read `token_count`, `chain` and `prefix` meanwhile. It keeps all tokens, 4 bytes
    per token.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        salt: bytes = b"",
        parent: bytes | None = None,
        extra_of_block: Callable[[int], bytes] | None = None,
    ) -> None:
        """The chain begins at the root of `layout` and `salt`, or at `parent`: a block key or a cut key.

        `extra_of_block(block)` returns the `extra_identity` of a block; blocks count from 0. It is called once per
        block, when the block is full, and once for each partial block that `prefix` returns.
        """
        try:
            fingerprint, self._block_tokens = layout.fingerprint, layout.block_tokens
        except AttributeError:
            raise InvalidRequest(
                f"layout is of type {type(layout).__name__}; it must be a Layout", field="layout"
            ) from None
        self.parent = root_key(fingerprint, salt) if parent is None else parent
        self._extra_of_block = extra_of_block
        self._tokens = bytearray()
        self._keys: list[bytes] = []
        self._token_count = 0  # Changed last, so that readers find the tokens and keys of this count.
        self._chain = BlockChain(self.parent, (), ())

    @property
    def token_count(self) -> int:
        """How many tokens were added, with those after the last whole block."""
        return self._token_count

    @property
    def chain(self) -> BlockChain:
        """The whole blocks so far. The same object is returned until the next block is full."""
        whole, chain = self._token_count // self._block_tokens, self._chain
        if len(chain) != whole:
            chain = self._chain = self.prefix(whole * self._block_tokens)
        return chain

    def extend(self, token_ids: ArrayLike | Sequence[int]) -> None:
        """Add tokens at the end: a list, another sequence of integers, or an array of any integer dtype.

        Raises InvalidRequest for ids that are not integers from 0 to 2**32 - 1. After an error, also one of
        `extra_of_block`, nothing is added.
        """
        added = _packed_tokens(token_ids)
        block_bytes = self._block_tokens * _TOKEN_BYTES
        pending = bytes(self._tokens[len(self._keys) * block_bytes :]) + added
        keys: list[bytes] = []
        tip = self._keys[-1] if self._keys else self.parent
        for end in range(block_bytes, len(pending) + 1, block_bytes):
            tip = _block_key(tip, pending[end - block_bytes : end], self._extra(len(self._keys) + len(keys)))
            keys.append(tip)
        self._tokens += added
        self._keys += keys
        self._token_count = len(self._tokens) // _TOKEN_BYTES

    def prefix(self, token_count: int) -> BlockChain:
        """The chain of the first `token_count` tokens. Its last block is partial if they end inside a block.

        Raises InvalidRequest if fewer tokens were added, or for a negative count.
        """
        if not 0 <= token_count <= self.token_count:
            raise InvalidRequest(
                f"token_count is {token_count}; the chain has {self.token_count} tokens", field="token_count"
            )
        whole, rest = divmod(token_count, self._block_tokens)
        keys, counts = tuple(self._keys[:whole]), (self._block_tokens,) * whole
        if rest:
            begin = (token_count - rest) * _TOKEN_BYTES
            tokens = bytes(self._tokens[begin : begin + rest * _TOKEN_BYTES])
            keys += (_block_key(keys[-1] if keys else self.parent, tokens, self._extra(whole)),)
            counts += (rest,)
        return BlockChain(self.parent, keys, counts)

    def _extra(self, block: int) -> bytes:
        return self._extra_of_block(block) if self._extra_of_block else b""


def block_chain(
    layout: Layout,
    token_ids: ArrayLike | Sequence[int],
    *,
    salt: bytes = b"",
    extras: Sequence[bytes] | None = None,
    with_partial: bool = False,
    parent: bytes | None = None,
) -> BlockChain:
    """The chain of `token_ids`, from the root on, or from `parent` on: a block key or a cut key.

    The chain has only full blocks, unless `with_partial`. `extras` has one `extra_identity` per block,
    and may be shorter than the chain. Raises InvalidRequest for ids that are not 32-bit unsigned integers.
    `ChainBuilder` makes the chain of tokens that are added later.
    """

    def extra_of_block(block: int) -> bytes:
        return extras[block] if extras and block < len(extras) else b""

    builder = ChainBuilder(layout, salt=salt, parent=parent, extra_of_block=extra_of_block if extras else None)
    builder.extend(token_ids)
    return builder.prefix(builder.token_count) if with_partial else builder.chain


def split_keys(packed: bytes, *, field: str, count_max: int) -> list[bytes]:
    """The keys in a packed field. Raises InvalidRequest if it is empty, too long, or cut off."""
    count, rest = divmod(len(packed), KEY_BYTES)
    if rest or not count:
        raise InvalidRequest(f"{field} has {len(packed)} bytes; it must hold keys of {KEY_BYTES} bytes", field=field)
    if count > count_max:
        raise InvalidRequest(f"{field} holds {count} keys; at most {count_max} are allowed", field=field)
    keys: list[bytes] = np.frombuffer(packed, f"V{KEY_BYTES}").tolist()  # A sixth of the time of slicing.
    return keys


def _block_key(parent: bytes, tokens: bytes, extra: bytes) -> bytes:
    """`tokens` are packed. One string is hashed, as each call of a hash costs as much as 500 bytes of input."""
    count = _U32.pack(len(tokens) // _TOKEN_BYTES)
    return hashlib.sha256(b"".join((_BLOCK_TAG, parent, count, tokens, _U32.pack(len(extra)), extra))).digest()


def _packed_tokens(token_ids: ArrayLike | Sequence[int]) -> bytes:
    """The ids as big-endian u32. Raises InvalidRequest if they are not one list of integers in range."""
    if isinstance(token_ids, Sequence) and not isinstance(token_ids, (str, bytes, bytearray, memoryview, array)):
        try:
            return _packed_list(token_ids if isinstance(token_ids, list) else list(token_ids))
        except (TypeError, OverflowError):
            pass  # NumPy decides, and names what is wrong.
    try:
        tokens = np.asarray(token_ids)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(f"token ids are not a list of integers: {error}", field="token_ids") from error
    if tokens.ndim != 1:
        raise InvalidRequest(f"token ids must be one list, not {tokens.ndim}-dimensional", field="token_ids")
    if tokens.size == 0:
        return b""
    if tokens.dtype.kind not in "iu":
        raise InvalidRequest(f"token ids must be integers, not {tokens.dtype}", field="token_ids")
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest > _U32_MAX:
        wrong = lowest if lowest < 0 else highest
        raise InvalidRequest(f"token id {wrong} is not in 0..{_U32_MAX}", field="token_ids")
    return tokens.astype(">u4").tobytes()


def _packed_list(token_ids: list[Any]) -> bytes:
    """As `_packed_tokens`, in a quarter of the time of `numpy.asarray`. Raises TypeError or OverflowError."""
    if token_ids and isinstance(token_ids[0], bool):
        raise TypeError("booleans are no token ids")  # An array takes them, and a list of only them is refused.
    tokens = array("I")
    tokens.fromlist(token_ids)
    if sys.byteorder == "little":
        tokens.byteswap()
    return tokens.tobytes()
