"""A layout of several layer groups: its encoding and fingerprint are the same in every release, on every host."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import pytest

from kvservice_api.layout import Layout
from kvservice_api.v1 import types_pb2 as pb
from tests.wire.vectors import golden, layer_group_of

LAYOUTS = golden("layer_groups")


def layout_of(fields: dict[str, Any]) -> Layout:
    return Layout(**fields | {"groups": [layer_group_of(group) for group in fields["groups"]]})


def encoded_by_hand(layout: dict[str, Any]) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack(">I", len(value.encode())) + value.encode()

    encoded = b"kvservice/layout/2" + text(layout["model_id"]) + text(layout["model_revision"])
    encoded += struct.pack(">IBI", layout["block_tokens"], layout["rotated"], len(layout["groups"]))
    for group in layout["groups"]:
        names = ("layers", "kv_heads", "k_head_dim", "v_head_dim", "window")
        rotary = group["rotary"]
        parameters = sorted(rotary["parameters"].items())
        encoded += text(group["dtype"]) + struct.pack(">5I", *(group[name] for name in names))
        encoded += text(rotary["kind"]) + text(rotary["pairing"])
        encoded += struct.pack(">IdI", rotary["dims"], rotary["base"], len(parameters))
        encoded += b"".join(text(name) + struct.pack(">d", value) for name, value in parameters)
    return encoded


@pytest.mark.parametrize("vector", LAYOUTS, ids=lambda vector: vector["layout"]["model_id"])
class TestLayerGroups:
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


def test_every_field_of_every_group_changes_the_fingerprint() -> None:
    first = LAYOUTS[0]["layout"]
    changes: dict[str, Any] = {
        "layers": 7, "kv_heads": 2, "k_head_dim": 640, "v_head_dim": 32, "dtype": "float16", "window": 77,
    }  # fmt: skip
    rotaries: dict[str, Any] = {"kind": "yarn", "base": 1.0, "dims": 32, "parameters": {"factor": 2.0}}
    fingerprints = {layout_of(first).fingerprint}
    for number, group in enumerate(first["groups"]):
        assert set(changes) | {"rotary"} == set(group)
        variants = [group | {name: value} for name, value in changes.items()]
        variants += [group | {"rotary": group["rotary"] | {name: value}} for name, value in rotaries.items()]
        for variant in variants:
            groups = [*first["groups"][:number], variant, *first["groups"][number + 1 :]]
            fingerprints.add(layout_of(first | {"groups": groups}).fingerprint)

    assert len(fingerprints) == 1 + len(first["groups"]) * (len(changes) + len(rotaries))
