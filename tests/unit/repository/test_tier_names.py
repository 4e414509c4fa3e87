"""The store knows its tiers by their order, not by their names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

STORE = Path(__file__).parents[3] / "kvservice" / "store"
# A lost index is rebuilt from the files of the SSD tier, which it names.
FILES = sorted(file for file in STORE.rglob("*.py") if file.parent.name != "repair")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(STORE)))
def test_no_file_of_the_store_names_a_tier(file: Path) -> None:
    named = [
        f"line {node.lineno}: TierName.{node.attr}"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "TierName"
    ]
    assert not named, "use BlockTable.first_tier, tiers or tiers_of: a store may have other tiers"


def test_the_files_of_the_store_are_found() -> None:
    assert "block_lifecycle.py" in {file.name for file in FILES}
