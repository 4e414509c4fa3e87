"""A store as commit b052b6d wrote it: the contents of ``tests/data/store-b052b6d.tar.xz``, and how it was made.

Every later version must open it and find its blocks, so the archive is never made again. It holds the store's
folder, the folder of its arena in shared memory, and ``contents.json``, which says what was saved. The bytes of a
block follow from its name, by `slice_content`. How it was made::

    git archive --prefix=old/ b052b6d | tar x -C /tmp
    cd /tmp/old && PYTHONPATH=.:proto:client python -P CHECKOUT/tests/old_store.py ARCHIVE

Its daemon ran with its clock in the year 2100, because sessions expire and pins end.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from kvservice_api.layout import Layout, Shard
    from kvservice_client import BlockCache, SessionState

ARCHIVE = Path(__file__).parent / "data" / "store-b052b6d.tar.xz"
MIB = 2**20
# They determine the size of the files, which a daemon checks.
SIZES = {
    "dram.capacity_bytes": 4 * MIB,
    "ssd.capacity_bytes": 5 * MIB,
    "index.durable_map_bytes": MIB,
    "index.volatile_map_bytes": MIB,
}
_YEAR_2100_MS = 4_102_444_800_000
_PERIOD = 1021  # Prime, so that no two slices, pages or frames begin with the same bytes.

_ROTARY = {"kind": "yarn", "pairing": "interleaved", "dims": 64, "base": 10_000.0, "parameters": [["factor", 4.0]]}
LAYOUTS: dict[str, dict[str, Any]] = {
    "small slices": {
        "model_id": "test/small", "dtype": "float16", "layers": 2, "kv_heads": 2, "k_head_dim": 16, "v_head_dim": 16,
        "block_tokens": 16, "rotary": {"kind": "default", "dims": 16, "base": 500_000.0},
    },
    "large slices": {
        "model_id": "test/large", "dtype": "bfloat16", "layers": 2, "kv_heads": 4, "k_head_dim": 64, "v_head_dim": 64,
        "block_tokens": 128, "rotated": False,
    },
    "latent": {
        "model_id": "test/latent", "model_revision": "main", "dtype": "float8_e4m3fn", "layers": 3, "kv_heads": 1,
        "k_head_dim": 72, "v_head_dim": 0, "block_tokens": 32, "rotary": _ROTARY,
    },
    "other widths": {
        "model_id": "test/other", "dtype": "float32", "layers": 1, "kv_heads": 1, "k_head_dim": 24, "v_head_dim": 8,
        "block_tokens": 256,
    },
}  # fmt: skip


def layout_named(name: str) -> Layout:
    from kvservice_api.layout import Layout, Rotary

    fields = dict(LAYOUTS[name])
    if rotary := fields.pop("rotary", None):
        parameters = tuple((name, value) for name, value in rotary.get("parameters", ()))
        fields["rotary"] = Rotary(**{**rotary, "parameters": parameters})
    return Layout(**fields)


def slice_content(key: bytes, shard: Shard, layer: int, size_bytes: int) -> NDArray[np.uint8]:
    """The saved bytes of layer `layer` of the block, counted from the model's first layer."""
    seed = hashlib.shake_256(key + shard.encode() + bytes([layer])).digest(_PERIOD)
    return np.resize(np.frombuffer(seed, np.uint8), size_bytes)


def unpack(folder: Path, shared_memory: Path) -> dict[str, Any]:
    """Unpack the store into ``folder/store`` and its arena into `shared_memory`. Returns the saved contents."""
    with tempfile.TemporaryDirectory(dir=folder) as unpacked, tarfile.open(ARCHIVE) as archive:
        archive.extractall(unpacked, filter="data")
        root = Path(unpacked)
        shutil.copytree(root / "store", folder / "store")
        for each in (root / "shared-memory").iterdir():
            shutil.copytree(each, shared_memory / each.name)
        contents: dict[str, Any] = json.loads((root / "contents.json").read_text())
        return contents


def _make(archive: Path) -> None:
    """Runs in a checkout of that commit, with its packages on the path and `tests.daemon` from it."""
    import tests.daemon
    from tests.daemon import DaemonProcess

    assert Path(tests.daemon.__file__).is_relative_to(Path.cwd()), "run it in the old checkout"
    settings = {**SIZES, "pins.ttl_max_s": 3660 * 86400, "session.ttl_s": 365 * 86400}
    with tempfile.TemporaryDirectory() as made:
        daemon = DaemonProcess(Path(made), program=("-P", __file__))
        drives = [daemon.store / "drive-0", daemon.store / "drive-1"]
        for drive in drives:
            drive.mkdir(parents=True)
        daemon.settings |= {**settings, "ssd.paths": ":".join(map(str, drives))}
        try:
            daemon.start()
            contents = _fill(daemon)
            assert daemon.stop() == 0
            checked = daemon.check()
            assert checked.returncode == 0, checked.stdout
            (Path(made) / "contents.json").write_text(json.dumps(contents, indent=1))
            with tarfile.open(archive, "w:xz", preset=9) as packed:
                for path in sorted(daemon.store.rglob("*")):
                    if path.is_file():
                        packed.add(path, Path("store") / path.relative_to(daemon.store))
                for path in sorted(daemon.shared_memory.rglob("*")):
                    packed.add(path, Path("shared-memory") / path.relative_to(daemon.shared_memory), recursive=False)
                packed.add(Path(made) / "contents.json", "contents.json")
        finally:
            daemon.remove()


def _fill(daemon: Any) -> dict[str, Any]:
    from kvservice_api.keys import BlockChain, block_chain, extra_identity
    from kvservice_api.layout import Shard
    from kvservice_client import Durability

    chains: list[dict[str, Any]] = []
    sessions: list[dict[str, Any]] = []

    with daemon.client(transport="shm") as by_shm, daemon.client(transport="grpc") as by_grpc:

        def save(name: str, seed: int, tokens: int, *, client: Any, shard: Shard | None = None, **keys: Any) -> Any:
            layout = layout_named(name)
            chain = block_chain(
                layout, np.random.default_rng(seed).integers(0, 50_000, tokens), with_partial=True, **keys
            )
            return chain, save_chain(name, chain, client=client, shard=shard)

        def save_chain(name: str, chain: BlockChain, *, client: Any, shard: Shard | None = None) -> BlockCache:
            cache: BlockCache = client.open_layout(layout_named(name), shard)
            shard = cache.shard
            layers = [
                [
                    slice_content(key, shard, layer, cache.slice_bytes(count))
                    for key, count in zip(chain.keys, chain.token_counts, strict=True)
                ]
                for layer in range(shard.layer_begin, shard.layer_end)
            ]
            result = cache.save(chain, layers, durability=Durability.SSD)
            assert result.is_complete and result.stored == len(chain), result
            chains.append(
                {
                    "layout": name,
                    "shard": shard.encode().hex(),
                    "keys": [key.hex() for key in chain.keys],
                    "token_counts": chain.token_counts,
                }
            )
            return cache

        small, _ = save("small slices", 1, 5 * 16 + 7, client=by_grpc)
        save("small slices", 2, 3 * 16, client=by_shm, salt=b"tenant-7")
        save("small slices", 3, 2 * 16, client=by_grpc, extras=[extra_identity("lora-1"), extra_identity("lora-1")])
        large, _ = save("large slices", 4, 2 * 128 + 10, client=by_shm)
        for layers in ((0, 1), (1, 2)):
            for heads in ((0, 1), (1, 4)):
                client = by_shm if layers[0] else by_grpc
                save("large slices", 5, 128 + 50, client=client, shard=Shard(*layers, *heads))
        latent, _ = save("latent", 6, 4 * 32 + 1, client=by_grpc)
        save("other widths", 7, 256, client=by_shm)

        # A conversation whose middle was cut out, with a tail that is open; its fork; and a conversation without a cut.
        talk, cache = save("small slices", 8, 4 * 16 + 5, client=by_shm)
        session = by_shm.session(cache.layout, "chat/8@example.org")
        state = session.append(talk)
        state = session.truncate([(0, 4), (20, 30), (60, 9)], state.revision)
        more = block_chain(cache.layout, range(100, 100 + 16 + 3), parent=state.tip, with_partial=True)
        save_chain("small slices", more, client=by_grpc)
        state = session.append(more, state.revision)
        session.fork("fork-of-8")
        by_grpc.session(layout_named("latent"), "latent").append(latent)

        for name, session_id in (
            ("small slices", "chat/8@example.org"),
            ("small slices", "fork-of-8"),
            ("latent", "latent"),
        ):
            sessions.append({"layout": name, **described(by_grpc.session(layout_named(name), session_id).get())})

        pinned = by_grpc.admin.pin(small.keys[:2], ttl_s=3650 * 86400)
        assert pinned.pinned == 2
        # Blocks in one tier only, of either kind.
        assert by_grpc.evict(large.keys[:1], "ssd").evicted == 1
        assert by_grpc.evict(large.keys[1:2], "dram").evicted == 1

        blocks = [
            {"key": each.key.hex(), "shard": Shard.from_proto(each.shard).encode().hex()}
            | {"dram": each.in_dram, "ssd": each.on_ssd}
            for each in by_grpc.admin.list_blocks()
        ]
    return {
        "layouts": {name: layout_named(name).fingerprint.hex() for name in LAYOUTS},
        "chains": chains,
        "sessions": sessions,
        "pinned": [key.hex() for key in small.keys[:2]],
        "blocks": blocks,
    }


def described(state: SessionState) -> dict[str, Any]:
    """The compared fields of a session, as JSON values."""
    return {
        "session_id": state.session_id,
        "revision": state.revision,
        "tip": state.tip.hex(),
        "tail_tokens": state.tail_tokens,
        "token_count": state.token_count,
        "cuts": state.cuts,
        "slices": [[each.key.hex(), each.first_token, each.token_count, each.block_tokens] for each in state.slices],
        "stored_positions": [each.stored_position for each in state.slices],
    }


def _serve() -> int:
    """The daemon of that commit, in the year 2100."""
    from kvservice import __main__, daemon
    from kvservice.clock import SystemClock

    class Clock(SystemClock):
        def __init__(self) -> None:
            super().__init__()
            self._wall_at_start_ms = _YEAR_2100_MS

    daemon.Daemon.open = functools.partial(daemon.Daemon.open, clock=Clock())  # type: ignore[method-assign]
    return __main__.main()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        sys.exit(_serve())
    _make(Path(sys.argv[1]))
