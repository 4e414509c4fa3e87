"""The reference pages under docs/ are what the code says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvservice.config import SETTINGS, environment_name
from kvservice.counters import HELP

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    subprocess.run([sys.executable, ROOT / "tools" / "generate_docs.py", folder], check=True)
    return folder


@pytest.mark.parametrize("page", ["configuration.md", "errors.md"])
def test_the_page_is_what_make_docs_writes(pages: Path, page: str) -> None:
    assert (ROOT / "docs" / page).read_text() == (pages / page).read_text(), "run `make docs`"


def named_in(page: str, pattern: str) -> set[str]:
    return set(re.findall(pattern, (ROOT / page).read_text()))


@pytest.mark.parametrize(
    "page",
    ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "docs/container.md", "docs/positions.md", "docs/security.md"],
)
def test_every_file_that_a_page_links_to_exists(page: str) -> None:
    folder = (ROOT / page).parent
    missing = {link for link in named_in(page, r"\]\((?!https?:)([^)#]+)") if not (folder / link).exists()}

    assert not missing


def test_every_source_file_that_the_architecture_names_exists() -> None:
    roots = [ROOT / folder for folder in ("kvservice", "proto", "client", "engine_adapter")]
    files = {f"/{file.relative_to(ROOT)}" for root in roots for file in root.rglob("*.py")}
    missing = {
        name
        for name in named_in("ARCHITECTURE.md", r"`([\w/]+\.py)`")
        if not any(file.endswith(f"/{name}") for file in files)
    }

    assert not missing


@pytest.mark.parametrize("page", ["docs/container.md", "docs/security.md"])
def test_every_setting_and_metric_that_a_page_names_exists(page: str) -> None:
    sections = "|".join({name.partition(".")[0] for name in SETTINGS})
    settings = named_in(page, rf"`((?:{sections})\.[a-z_]+)`")
    variables = named_in(page, r"(KVSERVICE_\w+__\w+)")
    counters = named_in(page, r"kvservice_(\w+)_total")

    assert settings <= set(SETTINGS)
    assert variables <= {environment_name(name) for name in SETTINGS}
    assert counters <= set(HELP)


@pytest.mark.parametrize("page", ["README.md", "docs/positions.md", "docs/transformers.md"])
def test_the_examples_of_a_page_are_python_and_import_what_there_is(page: str) -> None:
    examples = named_in(page, r"```python\n((?s:.*?))```")
    assert examples
    for example in examples:
        compile(example, page, "exec")
        lines = [line for line in example.splitlines() if line.startswith(("import ", "from "))]
        exec("\n".join(lines), {})
