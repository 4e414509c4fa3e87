"""Golden vectors: bytes that were computed once and never change, because disks and other programs have them.

A test that needs a changed vector needs a new version of what it describes instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvservice_api.layout import LayerGroup, Layout, Rotary

_FOLDER = Path(__file__).parent / "golden"


def golden(name: str) -> Any:
    return json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def layout_of(fields: dict[str, Any]) -> Layout:
    return Layout(**fields | {"rotary": _rotary_of(fields["rotary"])})


def layer_group_of(fields: dict[str, Any]) -> LayerGroup:
    return LayerGroup(**fields | {"rotary": _rotary_of(fields["rotary"])})


def _rotary_of(fields: dict[str, Any]) -> Rotary:
    return Rotary(**fields | {"parameters": tuple(fields["parameters"].items())})
