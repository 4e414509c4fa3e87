"""Variants of layouts."""

from __future__ import annotations

import dataclasses
from typing import Any

from kvservice_api.layout import Layout


def changed(layout: Layout, **fields: Any) -> Layout:
    """The layout with other values of these arguments of `Layout`. Its layers have one geometry."""
    return dataclasses.replace(layout, **fields)
