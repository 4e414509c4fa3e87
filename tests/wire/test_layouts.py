"""A layout's fingerprint is the same in every release, on every host."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import pytest

from kvservice_api.layout import Layout
from kvservice_api.v1 import types_pb2 as pb
from tests.wire.vectors import golden, layout_of

LAYOUTS = golden("layouts")


def encoded_by_hand(layout: dict[str, Any]) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack(">I", len(value.encode())) + value.encode()

    rotary = layout["rotary"]
    dims = [layout[name] for name in ("layers", "kv_heads", "k_head_dim", "v_head_dim", "block_tokens")]
    head = text(layout["model_id"]) + text(layout["model_revision"]) + text(layout["dtype"])
    numbers = struct.pack(">5IB", *dims, layout["rotated"])
    turns = text(rotary["kind"]) + text(rotary["pairing"]) + struct.pack(">Id", rotary["dims"], rotary["base"])
    parameters = sorted(rotary["parameters"].items())
    tail = b"".join(text(name) + struct.pack(">d", value) for name, value in parameters)
    return b"kvservice/layout/1" + head + numbers + turns + struct.pack(">I", len(parameters)) + tail


@pytest.mark.parametrize("vector", LAYOUTS, ids=lambda vector: vector["layout"]["model_id"])
class TestLayout:
    def test_encoding_and_fingerprint_are_the_golden_ones(self, vector: dict[str, Any]) -> None:
        layout = layout_of(vector["layout"])

        assert layout.encode().hex() == vector["encoded"]
        assert layout.fingerprint.hex() == vector["fingerprint"]

    def test_a_few_independent_lines_come_to_the_same_bytes(self, vector: dict[str, Any]) -> None:
        encoded = encoded_by_hand(vector["layout"])

        assert encoded.hex() == vector["encoded"]
        assert hashlib.sha256(encoded).hexdigest() == vector["fingerprint"]

    def test_it_survives_the_wire(self, vector: dict[str, Any]) -> None:
        layout = layout_of(vector["layout"])

        received = pb.Layout.FromString(layout.to_proto().SerializeToString())

        assert Layout.from_proto(received, bytes.fromhex(vector["fingerprint"])) == layout


def test_every_field_changes_the_fingerprint() -> None:
    first = LAYOUTS[0]["layout"]
    changes: dict[str, Any] = {
        "model_id": "other", "model_revision": "other", "dtype": "bfloat16", "layers": 31, "kv_heads": 4,
        "k_head_dim": 80, "v_head_dim": 80, "block_tokens": 128, "rotated": False,
    }  # fmt: skip
    rotaries: dict[str, Any] = {
        "kind": "yarn", "pairing": "interleaved", "dims": 32, "base": 1.0, "parameters": {"factor": 2.0},
    }  # fmt: skip
    assert set(changes) | {"rotary"} == set(first)
    assert set(rotaries) == set(first["rotary"])
    variants = [first | {name: value} for name, value in changes.items()]
    variants += [first | {"rotary": first["rotary"] | {name: value}} for name, value in rotaries.items()]

    fingerprints = {layout_of(variant).fingerprint for variant in [first, *variants]}

    assert len(fingerprints) == 1 + len(variants)
