"""The reference pages under docs/ agree with the code."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.policies import EXPERIMENTS
from kvservice.config_sources import SETTINGS, environment_name
from kvservice.metrics.rows import PREFIX
from kvservice.metrics.table import METRICS
from kvservice.policy import PLACEMENTS
from kvservice.simulate.command import simulate
from kvservice.simulate.command_plan import plan
from kvservice.simulate.engine import CONTENDERS
from kvservice.simulate.result import Result
from kvservice.simulate.traces import FORMATS
from kvservice_client.cli.policy import policy
from kvservice_client.cli.trace import trace

ROOT = Path(__file__).parents[3]
VERBS: tuple[Callable[..., None], ...] = (simulate, plan, policy)

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("ops/**/*.md")])


def program(verb: Callable[..., None]) -> typer.Typer:
    made = typer.Typer()
    made.command()(verb)
    return made


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    subprocess.run([sys.executable, ROOT / "tools" / "generate_docs.py", folder], check=True)
    return folder


@pytest.mark.parametrize(
    "page", ["configuration.md", "errors.md", "reference/metrics.md", "reference/python.md", "sizing.md"]
)
def test_the_page_is_what_make_docs_writes(pages: Path, page: str) -> None:
    assert (ROOT / "docs" / page).read_text() == (pages / page).read_text(), "run `make docs`"


def named_in(page: str, pattern: str) -> set[str]:
    return set(re.findall(pattern, (ROOT / page).read_text()))


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in PAGES])
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


@pytest.mark.parametrize(
    "page",
    [
        *("docs/container.md", "docs/deploying.md", "docs/hints.md", "docs/monitoring.md", "docs/operating.md"),
        *("docs/resizing.md", "docs/security.md", "docs/tickets.md", "docs/tracing.md", "docs/vllm.md"),
        *("ops/kubernetes/README.md", *(f"ops/runbooks/{page.name}" for page in ROOT.glob("ops/runbooks/*.md"))),
    ],
)
def test_every_setting_and_metric_that_a_page_names_exists(page: str) -> None:
    sections = "|".join({name.partition(".")[0] for name in SETTINGS})
    settings = named_in(page, rf"`((?:{sections})\.[a-z_]+)`")
    variables = named_in(page, r"(KVSERVICE_\w+__\w+)")
    metrics = named_in(page, r"(?<!:)\b(kvservice_\w+_(?:total|seconds|bytes|blocks))\b")

    assert settings <= set(SETTINGS)
    assert variables <= {environment_name(name) for name in SETTINGS}
    assert metrics <= {PREFIX + metric.name for metric in METRICS}


@pytest.mark.parametrize(
    "page",
    ["README.md", "docs/hints.md", "docs/positions.md", "docs/tickets.md", "docs/tracing.md", "docs/transformers.md"],
)
def test_the_examples_of_a_page_are_python_and_import_what_there_is(page: str) -> None:
    examples = named_in(page, r"```python\n((?s:.*?))```")
    assert examples
    for example in examples:
        compile(example, page, "exec")
        lines = [line for line in example.splitlines() if line.startswith(("import ", "from "))]
        exec("\n".join(lines), {})


def test_every_policy_is_explained_and_every_policy_that_is_explained_exists() -> None:
    page = (ROOT / "docs/policies.md").read_text().partition("## Simulating")[0]
    named = set(re.findall(r"`([a-z0-9-]+)`", page))

    assert set(CONTENDERS) <= named
    table = page.partition("| Policy |")[2].partition("\n\n")[0]
    assert set(re.findall(r"(?m)^\| `([a-z0-9-]+)` \|", table)) == set(PLACEMENTS) - {"foresight-unlearned"}


def test_every_option_that_the_page_on_policies_names_is_one_of_its_verbs() -> None:
    help_text = " ".join(CliRunner(env={"COLUMNS": "200"}).invoke(program(verb), ["--help"]).stdout for verb in VERBS)
    ours = named_in("docs/policies.md", r"(--[a-z][a-z-]*)")

    assert ours <= set(re.findall(r"--[a-z][a-z-]*", help_text))


def test_every_command_of_kvctl_that_a_page_names_takes_what_the_page_gives_it() -> None:
    verbs = {each.name: each for each in entry_points(group="kvctl.commands")}

    @cache
    def help_of(verb: str) -> str:
        return CliRunner(env={"COLUMNS": "300"}).invoke(program(verbs[verb].load()), ["--help"]).stdout

    wrong = []
    for page in PAGES:
        for verb, rest in re.findall(r"kvctl ([a-z]+)([^`\n#;|]*)", page.read_text()):
            if verb in verbs:
                given = re.findall(r"(?<=\s)(--[a-z][a-z-]*|[A-Z]{3,})(?=[\s.,\]]|$)", rest)
                wrong += [
                    f"{page.relative_to(ROOT)}: kvctl {verb} {each}"
                    for each in given
                    if each not in help_of(verb) and not each.startswith("--tls-")  # The program adds these to all.
                ]
    assert not wrong


def test_every_format_of_traces_is_in_the_table_of_its_page_and_none_else() -> None:
    page = (ROOT / "docs/traces.md").read_text()
    run = CliRunner(env={"COLUMNS": "200"})
    help_text = " ".join(run.invoke(program(verb), ["--help"]).stdout for verb in (simulate, trace))

    assert re.findall(r"(?m)^\| `([a-z-]+)` \|", page) == list(FORMATS[1:])
    assert named_in("docs/traces.md", r"(--[a-z][a-z-]*)") <= set(re.findall(r"--[a-z][a-z-]*", help_text))


def test_every_figure_that_the_page_on_policies_explains_is_one_of_the_results() -> None:
    table = (ROOT / "docs/policies.md").read_text().partition("### Figures")[2].partition("### Planning")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([a-z0-9_]+)`", row)}

    assert named <= {field.name for field in fields(Result)}
    assert len(named) > 10


def test_every_experiment_has_its_section_on_their_page() -> None:
    sections = set(re.findall(r"<!-- experiment (\w+): begin -->", (ROOT / "docs/policies-experiments.md").read_text()))

    assert sections == set(EXPERIMENTS)


def test_every_page_of_the_documentation_stands_in_its_index() -> None:
    listed = named_in("docs/README.md", r"\]\((?!https?:)([^)#]+)")

    pages = {
        str(page.relative_to(ROOT / "docs"))
        for folder in (".", "reference")
        for page in (ROOT / "docs" / folder).glob("*.md")
    }
    assert pages - {"README.md"} <= listed


def test_every_word_of_the_glossary_has_one_meaning() -> None:
    words = [
        word.strip()
        for row in re.findall(r"(?m)^\| ([^|]+) \|", (ROOT / "docs/glossary.md").read_text())
        for word in row.split(",")
    ]
    words = [word for word in words if word not in ("Word", "---")]

    assert len(words) > 50 and len(words) == len(set(words))


def test_every_program_that_a_page_runs_as_a_module_is_in_the_checkout() -> None:
    folders = "benchmarks|examples|tests|tools"
    missing = {
        f"{page.relative_to(ROOT)}: {module}"
        for page in PAGES
        for module in re.findall(rf"python3? -m ((?:{folders})[a-z_.]*[a-z])", page.read_text())
        if not any((ROOT / module.replace(".", "/")).with_suffix(end).exists() for end in (".py", ""))
    }
    assert not missing


def test_the_index_names_every_page() -> None:
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")}
    decisions = {page for page in pages if page.startswith("decisions/")} - {"decisions/README.md"}

    assert pages - decisions - {"README.md"} <= named_in("docs/README.md", r"\]\(([^)#]+)")
