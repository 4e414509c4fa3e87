"""The keys of vLLM's requests: equal for equal KV, different for anything that changes it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvservice_adapter.connectors.vllm.request_keys import extra_of_block, refusal_of, salt_of
from kvservice_api.keys import extra_identity
from kvservice_client import ChainBuilder, Layout

pytestmark = pytest.mark.fast

LAYOUT = Layout("m", "float32", layers=1, kv_heads=1, k_head_dim=4, v_head_dim=4, block_tokens=16)


def request(**fields: Any) -> Any:
    """The fields of vLLM's `Request` that keys depend on."""
    nothing = dict.fromkeys(("prompt_embeds", "prompt_is_token_ids", "pooling_params", "lora_request", "cache_salt"))
    return SimpleNamespace(**{**nothing, "resumable": False, "mm_features": [], **fields})


def lora(name: str, path: str) -> Any:
    return SimpleNamespace(lora_name=name, lora_path=path)


def image(identifier: str, offset: int, length: int) -> Any:
    return SimpleNamespace(identifier=identifier, mm_position=SimpleNamespace(offset=offset, length=length))


def keys(given: Any, generation: int = 0, tokens: int = 48) -> tuple[bytes, ...]:
    builder = ChainBuilder(
        LAYOUT, salt=salt_of(given, generation), extra_of_block=extra_of_block(given, LAYOUT.block_tokens)
    )
    builder.extend(range(tokens))
    return builder.chain.keys


def test_a_plain_request_has_the_keys_of_its_tokens() -> None:
    builder = ChainBuilder(LAYOUT)
    builder.extend(range(48))
    assert keys(request()) == builder.chain.keys


@pytest.mark.parametrize(
    "other",
    [
        request(cache_salt="a"),
        request(cache_salt="b"),
        request(lora_request=lora("x", "/one")),
        request(lora_request=lora("x", "/two")),
        request(lora_request=lora("y", "/one")),
    ],
)
def test_salts_and_adapters_share_nothing(other: Any) -> None:
    others = [request(), request(cache_salt="c"), request(lora_request=lora("z", "/one"))]
    assert all(set(keys(other)).isdisjoint(keys(each)) for each in others)


def test_generations_share_nothing() -> None:
    assert len({key for generation in range(3) for key in keys(request(cache_salt="s"), generation)}) == 9


def test_no_salt_of_a_request_is_that_of_a_generation() -> None:
    salted = salt_of(request(cache_salt="s"), 1)
    with pytest.raises(UnicodeDecodeError):
        salted.decode()


def test_an_image_changes_the_blocks_from_its_first_token_on() -> None:
    plain, with_image = keys(request()), keys(request(mm_features=[image("cat", 20, 4)]))
    assert with_image[0] == plain[0]
    assert set(with_image[1:]).isdisjoint(plain)


def test_an_image_across_two_blocks_belongs_to_both() -> None:
    extra = extra_of_block(request(mm_features=[image("cat", 10, 10)]), 16)
    assert extra is not None
    assert extra(0) != extra(1) != b""
    assert extra(2) == b""


def test_the_place_of_an_image_counts_from_its_block() -> None:
    first, later = (extra_of_block(request(mm_features=[image("cat", offset, 2)]), 16) for offset in (3, 19))
    assert first is not None
    assert later is not None
    assert first(0) == later(1) != extra_identity("", [b"cat"])


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"prompt_embeds": object()}, "embeddings"),
        ({"prompt_is_token_ids": [True, False]}, "embeddings"),
        ({"resumable": True}, "stream"),
        ({"pooling_params": object()}, "pooling"),
    ],
)
def test_requests_whose_tokens_do_not_say_their_kv_have_no_keys(fields: dict[str, Any], why: str) -> None:
    assert why in refusal_of(request(**fields))
    assert refusal_of(request()) == ""
