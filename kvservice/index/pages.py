"""Reads the pages of an LMDB file without LMDB: checks whether they are sound, and salvages their records.

LMDB trusts its file. A damaged page, or a file that is shorter than its pages, ends the process by
SIGSEGV, SIGBUS or an assertion. So the pages are checked before LMDB maps them. The format is that of LMDB
0.9, little-endian::

    page          | number u64 | pad u16 | flags u16 | lower u16 | upper u16 | node offsets u16 ... free ... nodes |
    overflow      | number u64 | pad u16 | flags u16 | pages u32             | bytes of one large value             |
    leaf node     | size u32           | flags u16 | key size u16 | key | value, or the number of its overflow page  |
    branch node   | child's number u48              | key size u16 | key |
    page 0 and 1  | header 16 | magic u32 | version u32 | address u64 | map size u64 | free tree 48 | main tree 48 |
                  | last page u64 | transaction u64 |                 the page of the later transaction counts
    free tree     | transaction u64 | list of the pages that this transaction freed |   keys are in host order

A flipped bit in the bytes of a key or a value is not detected here: records have a CRC for that.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_META = struct.Struct("<16xIIQQ48s48sQQ")
_TREE = struct.Struct("<IHHQQQQQ")
_HEAD = struct.Struct("<QHHHH")  # Of a page.
_NODE = struct.Struct("<IHH")  # Of a node.
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_HEAD_BYTES, _NODE_BYTES = _HEAD.size, _NODE.size
_BRANCH, _LEAF, _OVERFLOW, _META_PAGE = 1, 2, 4, 8
_BIG, _SUBTREE = 1, 2  # A leaf node's value is on overflow pages; is a tree.
_INTEGER_KEYS = 8  # Flags of the free tree.
_NO_PAGE = 2**64 - 1
_DEPTH_MAX = 32
_PAGES_AT_ONCE = 2048
_PAGE_BYTES_MIN, _PAGE_BYTES_MAX = 512, 65536

Numbers = NDArray[np.int64]
Bytes = NDArray[np.uint8]


class Unsound(Exception):
    """The message says what is wrong with the file."""


class _Tree(NamedTuple):
    page_bytes: int  # Of the free tree only: LMDB keeps it there.
    flags: int
    depth: int
    branch_pages: int
    leaf_pages: int
    overflow_pages: int
    entries: int
    root: int


class _Meta(NamedTuple):
    page_bytes: int
    free: _Tree
    main: _Tree
    last_page: int
    txn: int


class _Leaf(NamedTuple):
    """A leaf node outside of its page. `value` is None if it is on overflow pages, from `overflow` on."""

    flags: int
    key: bytes
    value: bytes | None
    size: int
    overflow: int


def examine(path: Path) -> str:
    """Why LMDB cannot open the file safely; "" if it can, or if the file is missing or empty.

    Reads every page that is in use: a million records take 0.3 s of CPU time. Raises OSError.
    """
    try:
        fd = _open(path)
    except FileNotFoundError:
        return ""
    try:
        size = os.fstat(fd).st_size
        if size:
            _Check(fd, size).run()
    except Unsound as error:
        return str(error)
    finally:
        os.close(fd)
    return ""


def salvage(path: Path) -> Iterator[tuple[bool, bytes, bytes]]:
    """Every key and value that a leaf page of the file holds: whether it is in use, key, value.

    Works on any file. Deleted and replaced values may be included, as not in use: LMDB does not clear freed
    pages. Values are as found: check their CRC. Raises OSError.
    """
    fd = _open(path)
    try:
        size = os.fstat(fd).st_size
        page_bytes = next((meta.page_bytes for meta in _metas(fd) if meta is not None), os.sysconf("SC_PAGESIZE"))
        in_use = _reachable(fd, size, page_bytes)
        for number in range(size // page_bytes):
            try:
                page = os.pread(fd, page_bytes, number * page_bytes)
            except OSError:  # A place that the disk cannot read.
                continue
            if len(page) < page_bytes or _HEAD.unpack_from(page)[2] != _LEAF:
                continue
            for leaf in _leaves_of(page):
                value = leaf.value if leaf.value is not None else _overflow_value(fd, leaf, page_bytes, size)
                if value is not None:
                    yield number in in_use, leaf.key, value
    finally:
        os.close(fd)


def last_transaction(path: Path) -> int | None:
    """The number of the file's last transaction; None if it is unreadable. Raises OSError."""
    fd = _open(path)
    try:
        return max((meta.txn for meta in _metas(fd) if meta is not None), default=None)
    finally:
        os.close(fd)


def leaf_pages_in_use(path: Path) -> list[int]:
    """The numbers of the leaf pages that the last transaction's trees lead to, of a sound file. Raises OSError."""
    fd = _open(path)
    try:
        metas = [meta for meta in _metas(fd) if meta is not None]
        size, page_bytes = os.fstat(fd).st_size, metas[0].page_bytes
        in_use = _reachable(fd, size, page_bytes)
        heads = {number: os.pread(fd, _HEAD_BYTES, number * page_bytes) for number in in_use}
        return [number for number, head in heads.items() if _HEAD.unpack(head)[2] == _LEAF]
    finally:
        os.close(fd)


def _open(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(f"{path} is no regular file")
    return fd


class _Check:
    """One check of an open file. `run` raises Unsound."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._size = size
        one, other = _metas(fd)
        if one is None or other is None:
            raise Unsound("one of its first two pages is damaged")
        if one.page_bytes != other.page_bytes:
            raise Unsound("its first two pages contradict each other")
        # Each transaction writes the other page: their numbers are one apart, and 0 is on both at first.
        if one.txn % 2 or (other.txn % 2 == 0 and other.txn) or (abs(one.txn - other.txn) != 1 and one.txn + other.txn):
            raise Unsound("its first two pages are not of two successive transactions")
        self._earlier, self._meta = (other, one) if one.txn >= other.txn else (one, other)
        self._page_bytes = self._meta.page_bytes
        if self._meta.last_page >= size // 16:  # Not closer: free pages at the end may never have been written.
            raise Unsound(f"it has {size} bytes and names {self._meta.last_page} pages")
        self._used = np.zeros(self._meta.last_page + 1, np.bool_)
        self._used[:2] = True

    def run(self) -> None:
        free, main = self._meta.free, self._meta.main
        if free.flags != _INTEGER_KEYS or main.flags:
            raise Unsound("its first two pages name kinds of trees that no index has")
        for name, leaf in self._items("main", main):
            if leaf.flags != _SUBTREE or leaf.value is None or len(leaf.value) != _TREE.size:
                raise Unsound(f"its main tree has the entry {name!r}, which names no tree")
            tree = _Tree(*_TREE.unpack(leaf.value))
            if tree.flags:
                raise Unsound(f"its tree {name!r} is of a kind that no index has")
            self._walk(repr(name), tree)
        for _, leaf in self._items("free", free, integers=True):
            value = leaf.value if leaf.value is not None else self._value(leaf)
            words = np.frombuffer(value, "<u8", len(value) // 8)
            if not len(words) or int(words[0]) > len(words) - 1:
                raise Unsound("its list of free pages is damaged")
            self._claim("free", words[1 : 1 + int(words[0])])
        for meta in (self._earlier, self._meta):
            self._check_transaction(meta)

    def _check_transaction(self, meta: _Meta) -> None:
        """Raises Unsound if one of the first two pages has the number of another transaction than its own.

        A wrong number can make the earlier of the two pages count, which silently undoes the last commit. Every
        transaction but the first replaces the root of the main tree, and frees the old one under its own number.
        So the last key of a page's free tree is the number of the transaction that wrote the page.
        """
        if not meta.txn and meta.main.root != _NO_PAGE:
            raise Unsound("one of its first two pages has a tree, and says that no transaction wrote it")
        last = self._last_freed(meta)
        if last is not None and last != meta.txn and (last or meta.txn > 1):
            raise Unsound(
                f"one of its first two pages says that transaction {meta.txn} wrote it, and its list of free pages "
                f"ends with transaction {last}"
            )

    def _last_freed(self, meta: _Meta) -> int | None:
        """The last key of the page's free tree, 0 if it is empty. None if it cannot be read.

        The free tree of the earlier page has not been checked: a later commit may use damaged pages of it again, so
        these are no reason to refuse the file.
        """
        if meta.free.root == _NO_PAGE:
            return 0
        number = meta.free.root
        for _ in range(_DEPTH_MAX):
            if not 2 <= number <= meta.last_page:
                return None
            page = os.pread(self._fd, self._page_bytes, number * self._page_bytes)
            if len(page) < self._page_bytes:
                return None
            found, _, flags, lower, _ = _HEAD.unpack_from(page)
            if found != number or flags not in (_BRANCH, _LEAF) or not _HEAD_BYTES + 2 <= lower <= self._page_bytes:
                return None
            offset = int.from_bytes(page[lower - 2 : lower], "little")  # Of the last node.
            if not _HEAD_BYTES <= offset <= self._page_bytes - _NODE_BYTES - 8:
                return None
            if flags == _LEAF:
                return int.from_bytes(page[offset + _NODE_BYTES : offset + _NODE_BYTES + 8], "little")
            number = int.from_bytes(page[offset : offset + 6], "little")
        return None

    def _items(self, name: str, tree: _Tree, *, integers: bool = False) -> Iterator[tuple[bytes, _Leaf]]:
        """All of a small tree, its pages checked."""
        pages = self._walk(name, tree, integers=integers)
        for page in self._read(pages):
            for leaf in _leaves_of(page.tobytes()):
                yield leaf.key, leaf

    def _walk(self, name: str, tree: _Tree, *, integers: bool = False) -> Numbers:
        """Check a tree. Returns the numbers of its leaf pages in the order of their keys."""
        level = np.array([], np.int64)
        lows: list[bytes | None] = []  # The lower bound of a page's keys.
        branch_pages = entries = overflow_pages = 0
        if tree.root != _NO_PAGE:
            if not 1 <= tree.depth <= _DEPTH_MAX:
                raise Unsound(f"its tree {name} has a depth of {tree.depth}")
            level, lows = self._claim(name, np.array([tree.root], np.uint64)), [None]
            for _ in range(tree.depth - 1):
                branch_pages += len(level)
                level, lows = self._children(name, level, lows, least=1 if integers else 2)
            last: bytes | None = None
            for start in range(0, len(level), _PAGES_AT_ONCE):
                some = slice(start, start + _PAGES_AT_ONCE)
                found = self._check_leaves(name, level[some], integers)
                entries += found.entries
                overflow_pages += found.overflow_pages
                for low, (first, end) in zip(lows[some], found.ends, strict=True):
                    if not (_below(last, first, integers) and _below(last, low, integers)):
                        raise Unsound(f"its tree {name} has keys out of order")
                    if low is not None and _below(first, low, integers):
                        raise Unsound(f"its tree {name} has keys in the wrong page")
                    last = end
        found_counts = (branch_pages, len(level), overflow_pages, entries)
        if found_counts != (tree.branch_pages, tree.leaf_pages, tree.overflow_pages, tree.entries):
            raise Unsound(f"its tree {name} has a wrong number of pages or entries")
        return level

    def _children(
        self, name: str, level: Numbers, lows: Sequence[bytes | None], least: int
    ) -> tuple[Numbers, list[bytes | None]]:
        children: list[int] = []
        child_lows: list[bytes | None] = []
        for start in range(0, len(level), _PAGES_AT_ONCE):
            some = slice(start, start + _PAGES_AT_ONCE)
            pages = self._read(level[some])
            nodes = self._nodes(name, pages, level[some], _BRANCH, least)
            keys = _keys_of(pages, nodes)
            numbers = nodes.sizes | nodes.flags << 32
            children += numbers.tolist()
            firsts = np.flatnonzero(nodes.slots == 0).tolist()
            child_lows += keys
            for first, low in zip(firsts, lows[some], strict=True):
                child_lows[len(child_lows) - len(keys) + first] = low  # A page's first key counts for nothing.
        return self._claim(name, np.array(children, np.uint64)), child_lows

    def _check_leaves(self, name: str, numbers: Numbers, integers: bool) -> _Leaves:
        pages = self._read(numbers)
        nodes = self._nodes(name, pages, numbers, _LEAF, 1)
        if not np.isin(nodes.flags, (0, _BIG, _SUBTREE)).all():
            raise Unsound(f"its tree {name} has values of an unknown kind")
        overflow_pages = 0
        for row in np.flatnonzero(nodes.flags == _BIG).tolist():
            place = int(nodes.starts[row]) + _NODE_BYTES + int(nodes.key_sizes[row])
            number = int.from_bytes(pages.reshape(-1)[place : place + 8].tobytes(), "little")
            overflow_pages += self._claim_overflow(name, number, int(nodes.sizes[row]))
        if integers and (nodes.key_sizes != 8).any():
            raise Unsound(f"its tree {name} has keys of another size")
        _check_order(name, pages, nodes, integers)
        starts = np.flatnonzero(nodes.slots == 0)
        ends = np.append(starts[1:], len(nodes.slots)) - 1
        firsts, lasts = _keys_of(pages, nodes.only(starts)), _keys_of(pages, nodes.only(ends))
        return _Leaves(len(nodes.slots), overflow_pages, list(zip(firsts, lasts, strict=True)))

    def _nodes(self, name: str, pages: Bytes, numbers: Numbers, kind: int, least: int) -> _Nodes:
        """The nodes of pages of one kind, which fill each page from `upper` to its end."""
        heads = np.ascontiguousarray(pages[:, :_HEAD_BYTES])
        words = heads.view("<u2").astype(np.int64)
        flags, lower, upper = words[:, 5], words[:, 6], words[:, 7]
        counts = (lower - _HEAD_BYTES) // 2
        sound = (heads.view("<u8")[:, 0] == numbers.astype(np.uint64)) & (flags == kind) & (counts >= least)
        sound &= (lower % 2 == 0) & (lower <= upper) & (upper <= self._page_bytes)
        if not sound.all():
            raise Unsound(f"its page {numbers[~sound][0]} in the tree {name} is damaged")
        which = np.repeat(np.arange(len(pages)), counts)
        slots = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
        halves = pages.reshape(-1).view("<u2")
        base = which * self._page_bytes
        offsets = halves[base // 2 + _HEAD_BYTES // 2 + slots].astype(np.int64)
        fits = (offsets % 2 == 0) & (offsets >= upper[which]) & (offsets <= self._page_bytes - _NODE_BYTES)
        if not fits.all():
            raise Unsound(f"its page {numbers[which[~fits][0]]} in the tree {name} is damaged")
        starts = base + offsets
        low, high, node_flags, key_sizes = (halves[starts // 2 + field].astype(np.int64) for field in range(4))
        sizes = low | high << 16
        if kind == _LEAF:
            taken = _NODE_BYTES + key_sizes + np.where(node_flags == _BIG, 8, sizes)
        else:
            taken = _NODE_BYTES + key_sizes
        taken += taken % 2
        order = np.argsort(starts)
        ends = (starts + taken)[order]
        page_ends = base[order] + self._page_bytes
        is_last = np.append(which[1:] != which[:-1], True)
        follows = np.append(starts[order][1:], 0)
        first_rows = np.flatnonzero(slots == 0)
        tiled = np.where(is_last, ends == page_ends, ends == follows)
        if not tiled.all() or (starts[order][first_rows] != base[first_rows] + upper).any():
            bad = which[np.flatnonzero(~tiled)[0]] if not tiled.all() else 0
            raise Unsound(f"its page {numbers[bad]} in the tree {name} is damaged")
        return _Nodes(which, slots, starts, sizes, node_flags, key_sizes)

    def _claim(self, name: str, numbers: NDArray[np.uint64]) -> Numbers:
        """Note that these pages are in use, each once."""
        if (numbers >= len(self._used)).any():
            raise Unsound(f"its tree {name} names a page that does not exist")
        places = numbers.astype(np.int64)
        if self._used[places].any() or len(np.unique(places)) < len(places):
            raise Unsound(f"its tree {name} names a page that is in use already")
        self._used[places] = True
        return places

    def _claim_overflow(self, name: str, number: int, size: int) -> int:
        if not 2 <= number < len(self._used):
            raise Unsound(f"its tree {name} names a page that does not exist")
        if (number + 1) * self._page_bytes > self._size:
            raise Unsound(self._cut_short())
        found, _, flags, low, high = _HEAD.unpack(os.pread(self._fd, _HEAD_BYTES, number * self._page_bytes))
        pages = int(low | high << 16)
        if found != number or flags != _OVERFLOW or pages * self._page_bytes < _HEAD_BYTES + size:
            raise Unsound(f"its page {number} in the tree {name} is damaged")
        if number + pages > len(self._used):
            raise Unsound(f"its tree {name} names a page that does not exist")
        if (number + pages) * self._page_bytes > self._size:
            raise Unsound(self._cut_short())
        self._claim(name, np.arange(number, number + pages, dtype=np.uint64))
        return pages

    def _value(self, leaf: _Leaf) -> bytes:
        """The value on overflow pages that `_walk` has checked."""
        return os.pread(self._fd, leaf.size, leaf.overflow * self._page_bytes + _HEAD_BYTES)

    def _read(self, numbers: Numbers) -> Bytes:
        """The pages, one per row. Adjacent pages are read in one call."""
        pages = np.empty((len(numbers), self._page_bytes), np.uint8)
        breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
        for start, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(numbers)], strict=True):
            if end == start:
                continue
            into = pages[start:end].reshape(-1)
            if os.preadv(self._fd, [into.data], int(numbers[start]) * self._page_bytes) != len(into):
                raise Unsound(self._cut_short())
        return pages

    def _cut_short(self) -> str:
        return f"it was cut short: it has {self._size} bytes, and pages after these are in use"


class _Leaves(NamedTuple):
    entries: int
    overflow_pages: int
    ends: list[tuple[bytes, bytes]]  # The first and the last key of each page.


class _Nodes(NamedTuple):
    """Nodes of several pages, in the order of their keys."""

    which: Numbers  # The row of their page.
    slots: Numbers  # The index of the node within its page, from 0.
    starts: Numbers  # Where they begin, counted through all pages.
    sizes: Numbers
    flags: Numbers
    key_sizes: Numbers

    def only(self, rows: Numbers) -> _Nodes:
        return _Nodes(*(column[rows] for column in self))


def _metas(fd: int) -> tuple[_Meta | None, _Meta | None]:
    """The content of the first two pages; None for one that is no meta page."""
    first = _meta(os.pread(fd, _META.size, 0), 0)
    second = first.page_bytes if first is not None else os.sysconf("SC_PAGESIZE")
    return first, _meta(os.pread(fd, _META.size, second), 1)


def _meta(data: bytes, number: int) -> _Meta | None:
    if len(data) < _META.size:
        return None
    found, _, flags, _, _ = _HEAD.unpack_from(data)
    magic, version, _, _, free, main, last_page, txn = _META.unpack(data)
    meta = _Meta(_TREE.unpack(free)[0], _Tree(*_TREE.unpack(free)), _Tree(*_TREE.unpack(main)), last_page, txn)
    sound = (found, flags, magic, version) == (number, _META_PAGE, _MAGIC, _VERSION)
    size = meta.page_bytes
    sound = sound and _PAGE_BYTES_MIN <= size <= _PAGE_BYTES_MAX and size & (size - 1) == 0 and 1 <= last_page < 2**40
    return meta if sound else None


def _below(one: bytes | None, other: bytes | None, integers: bool) -> bool:
    """Whether a key sorts before another. None sorts before all, and after all."""
    if one is None or other is None:
        return True
    return one[::-1] < other[::-1] if integers else one < other


def _keys_of(pages: Bytes, nodes: _Nodes) -> list[bytes]:
    data = pages.reshape(-1).data
    starts = (nodes.starts + _NODE_BYTES).tolist()
    ends = (nodes.starts + _NODE_BYTES + nodes.key_sizes).tolist()
    return [bytes(data[start:end]) for start, end in zip(starts, ends, strict=True)]


def _check_order(name: str, pages: Bytes, nodes: _Nodes, integers: bool) -> None:
    """Raises Unsound if a page's keys do not ascend."""
    same_page = nodes.which[1:] == nodes.which[:-1]
    if integers or (nodes.key_sizes < 8).any():
        unsure = same_page.copy()
        ascends = ~same_page
    else:
        # The first eight bytes nearly always differ, and NumPy compares them in one step.
        where = (nodes.starts + _NODE_BYTES)[:, None] + np.arange(8)
        heads = pages.reshape(-1)[where].view(">u8")[:, 0].astype(np.uint64)
        ascends = (heads[:-1] < heads[1:]) | ~same_page
        unsure = (heads[:-1] == heads[1:]) & same_page
    rows = np.flatnonzero(unsure)
    keys, following = _keys_of(pages, nodes.only(rows)), _keys_of(pages, nodes.only(rows + 1))
    ascends[rows] = [_below(one, other, integers) for one, other in zip(keys, following, strict=True)]
    if not ascends.all():
        raise Unsound(f"its tree {name} has keys out of order")


def _leaves_of(page: bytes) -> Iterator[_Leaf]:
    """The nodes of a leaf page, as far as they can be read. For pages that may be damaged, too."""
    _, _, _, lower, _ = _HEAD.unpack_from(page)
    for place in range(_HEAD_BYTES, min(lower, len(page)) - 1, 2):
        offset = int.from_bytes(page[place : place + 2], "little")
        if not _HEAD_BYTES <= offset <= len(page) - _NODE_BYTES:
            continue
        size, flags, key_size = _NODE.unpack_from(page, offset)
        start = offset + _NODE_BYTES + key_size
        end = start + (8 if flags == _BIG else size)
        if end > len(page):
            continue
        key, value = page[start - key_size : start], page[start:end]
        if flags == _BIG:
            yield _Leaf(flags, key, None, size, int.from_bytes(value, "little"))
        else:
            yield _Leaf(flags, key, value, size, 0)


def _overflow_value(fd: int, leaf: _Leaf, page_bytes: int, size: int) -> bytes | None:
    start = leaf.overflow * page_bytes
    if start + _HEAD_BYTES + leaf.size > size:
        return None
    head = os.pread(fd, _HEAD_BYTES, start)
    if _HEAD.unpack(head)[0] != leaf.overflow or _HEAD.unpack(head)[2] != _OVERFLOW:
        return None
    value = os.pread(fd, leaf.size, start + _HEAD_BYTES)
    return value if len(value) == leaf.size else None


def _reachable(fd: int, size: int, page_bytes: int) -> set[int]:
    """The pages that the last transaction's trees lead to, as far as they can be read."""
    found: set[int] = set()
    metas = [meta for meta in _metas(fd) if meta is not None]
    waiting = [max(metas, key=lambda meta: meta.txn).main.root] if metas else []
    while waiting:
        number = waiting.pop()
        if number in found or not 2 <= number < size // page_bytes:
            continue
        try:
            page = os.pread(fd, page_bytes, number * page_bytes)
        except OSError:
            continue
        if len(page) < page_bytes:
            continue
        _, _, flags, lower, _ = _HEAD.unpack_from(page)
        found.add(number)
        if flags == _LEAF:
            trees = (leaf.value for leaf in _leaves_of(page) if leaf.flags == _SUBTREE and leaf.value)
            waiting += [_TREE.unpack(tree)[-1] for tree in trees if len(tree) == _TREE.size]
        elif flags == _BRANCH:
            for place in range(_HEAD_BYTES, min(lower, page_bytes) - 1, 2):
                offset = int.from_bytes(page[place : place + 2], "little")
                if _HEAD_BYTES <= offset <= page_bytes - _NODE_BYTES:
                    waiting.append(int.from_bytes(page[offset : offset + 6], "little"))
    return found
