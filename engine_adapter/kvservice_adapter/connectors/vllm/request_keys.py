"""The keys of a vLLM request's blocks, and which requests have none.

Keys follow from token ids alone, not from vLLM's own hashes, and from what else changes a token's KV: the LoRA adapter,
the images whose placeholders are in a block, and vLLM's `cache_salt`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from kvservice_api.keys import extra_identity

_OFFSET = struct.Struct(">i")
_GENERATION = struct.Struct(">Q")
_GENERATION_TAG = b"\xffkvservice/generation/1"  # No text in UTF-8 begins so: no `cache_salt` is the same.


def refusal_of(request: Any) -> str:
    """Why a request is neither looked up nor saved; empty if it is."""
    if request.prompt_embeds is not None or request.prompt_is_token_ids is not None:
        return "its prompt has embeddings, which its token ids do not name"
    if request.resumable:
        return "its input is a stream: vLLM changes tokens that it has computed"
    if request.pooling_params is not None:
        return "it is a pooling request"
    return ""


def salt_of(request: Any, generation: int) -> bytes:
    """The salt of a request's keys. Generations that `reset_cache` began share nothing."""
    salt = (request.cache_salt or "").encode()
    return _GENERATION_TAG + _GENERATION.pack(generation) + salt if generation else salt


def extra_of_block(request: Any, block_tokens: int) -> Callable[[int], bytes] | None:
    """The `extra_identity` of each block of a request; None if no block has one.

    An adapter is its name and its path. An image is its hash and where its placeholder begins, relative to the block.
    It belongs to each block that has a part of it.
    """
    lora = request.lora_request
    adapter = f"{lora.lora_name}\0{lora.lora_path}" if lora is not None else ""
    media = [
        (each.mm_position.offset, each.mm_position.offset + each.mm_position.length, each.identifier.encode())
        for each in request.mm_features
    ]
    if not adapter and not media:
        return None

    def extra(block: int) -> bytes:
        first, end = block * block_tokens, (block + 1) * block_tokens
        within = [
            _OFFSET.pack(begin - first) + identifier
            for begin, last, identifier in media
            if begin < end and last > first
        ]
        return extra_identity(adapter, within)

    return extra
