"""LMCache's multi-process server in its engine-driven mode: all blocks of a client in one store, and one retrieve.

With the option `mode` "shm" the client copies between its memory and the server's pool in shared memory; with "pickle",
which LMCache uses where they share no memory, the blocks travel in messages over TCP. A get includes the lookup. What
LMCache's connector does besides, to gather blocks from an engine's pages and back, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import zmq
from lmcache.v1.distributed.api import MemoryLayoutDesc
from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey, RegisterEngineDrivenContextPayload
from lmcache.v1.multiprocess.transfer_context.base import (
    EngineDrivenContext,
    EngineDrivenContextMetadata,
    create_engine_driven_context,
)
from lmcache.v1.multiprocess.transport.factory import RequestClientFactory

from benchmarks.peers.drivers.loop import Bytes, Client, Memory, Servers, System, free_port, main, program

_CHUNK_TOKENS = 256
_LAYERS = 32
_TIMEOUT_S = 15.0


class MultiProcess(System):
    def start(self, servers: Servers) -> None:
        self.port, http, prometheus = free_port(), free_port(), free_port()
        shared = ["--shm-name", self.options["shm_name"]] if self.options["mode"] == "shm" else []
        servers.run(
            [
                *(program("lmcache"), "server", "--host", "127.0.0.1", "--port", str(self.port)),
                *("--http-port", str(http), "--prometheus-port", str(prometheus), "--chunk-size", str(_CHUNK_TOKENS)),
                *("--l1-size-gb", f"{2 * self.bytes_max / (1 << 30) + 0.5:.2f}", "--eviction-policy", "LRU"),
                *("--supported-transfer-mode", "auto", *shared),
            ],
            port=http,
            env={"LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1"},
        )

    def client(self, memory: Memory, number: int) -> Client:
        return MultiProcessClient(self.port, number, self.options["mode"])


class MultiProcessClient(Client):
    def __init__(self, port: int, number: int, mode: str) -> None:
        self._number = number
        self._mode = mode
        self._requests = RequestClientFactory.create(f"tcp://127.0.0.1:{port}", context=zmq.Context())
        self._contexts: dict[int, tuple[int, EngineDrivenContext]] = {}
        self._instance = 0
        self._context: EngineDrivenContext

    def names(self, turn: str, block_bytes: int, blocks: int) -> IPCCacheServerKey:
        if block_bytes not in self._contexts:
            self._contexts[block_bytes] = self._registered(block_bytes)
        self._instance, self._context = self._contexts[block_bytes]
        first = int.from_bytes(turn.encode()[:8], "little") % 2**31  # Other tokens in each turn.
        tokens = tuple(first + token for token in range(blocks * _CHUNK_TOKENS))
        salt = f"client-{self._number}"
        return IPCCacheServerKey(
            f"peers-{block_bytes}", 1, 0, tokens, 0, len(tokens), turn, cache_salt=salt, num_kv_readers=1
        )

    def put(self, names: Any, blocks: Sequence[Bytes]) -> None:
        shape = self._context.layout_desc.shapes[0]
        tensors = [torch.from_numpy(block).view(torch.bfloat16).view(shape) for block in blocks]
        prepared = self._context.prepare_store(names, self._instance)
        if self._mode == "shm":
            assert prepared is not None and len(prepared[0]) == len(blocks), prepared
            for slot, tensor in zip(prepared[0], tensors, strict=True):
                slot.copy_(tensor)
        if not self._context.commit_store(names, self._instance, tensors):
            raise RuntimeError("LMCache's server refused a store")

    def get(self, names: Any, blocks: Sequence[Bytes]) -> Sequence[Any] | None:
        self._requests.lookup(replace(names, worker_id=None), 1).result(timeout=_TIMEOUT_S)
        hits = None
        while hits is None:
            hits = self._requests.query_prefetch_status(names.request_id).result(timeout=_TIMEOUT_S)
        if hits != len(blocks):
            raise RuntimeError(f"LMCache's server has only {hits} of {len(blocks)} blocks")
        chunks = self._context.prepare_retrieve(names, self._instance)
        if chunks is None:
            raise RuntimeError("LMCache's server did not deliver the blocks")
        if self._mode == "shm":
            for chunk, block in zip(chunks, blocks, strict=True):
                torch.from_numpy(block).view(torch.bfloat16).view(chunk.shape).copy_(chunk)
        self._context.commit_retrieve(names, self._instance)
        if self._mode == "shm":
            return None
        return [chunk.view(torch.uint8).view(-1).numpy() for chunk in chunks]

    def drop(self, names: Any) -> None:
        self._requests.end_session(names.request_id).result(timeout=_TIMEOUT_S)
        if not self._number:
            self._requests.clear().result(timeout=_TIMEOUT_S)

    def _registered(self, block_bytes: int) -> tuple[int, EngineDrivenContext]:
        """An instance number, and the context for blocks of this size."""
        hidden = block_bytes // 2 // _LAYERS // _CHUNK_TOKENS // 2  # In bfloat16.
        instance = 1000 * (self._number + 1) + len(self._contexts)
        answer = self._requests.register_kv_cache_engine_driven_context(
            RegisterEngineDrivenContextPayload(
                instance_id=instance,
                model_name=f"peers-{block_bytes}",
                world_size=1,
                block_size=_CHUNK_TOKENS,
                num_layers=_LAYERS,
                hidden_dim_size=hidden,
                dtype_str="bfloat16",
                use_mla=False,
                num_physical_slots=_CHUNK_TOKENS,
            )
        ).result(timeout=_TIMEOUT_S)
        shape = torch.Size([2, _LAYERS, _CHUNK_TOKENS, hidden])
        about = EngineDrivenContextMetadata(MemoryLayoutDesc([shape], [torch.bfloat16]), _CHUNK_TOKENS, False)
        use_pickle = self._mode == "pickle"
        context = create_engine_driven_context(
            about, self._requests, _TIMEOUT_S, answer.shm_name, answer.pool_size, use_pickle=use_pickle
        )
        return instance, context


if __name__ == "__main__":
    main(MultiProcess)
