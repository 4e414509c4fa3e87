"""One word has one meaning: class names are unique, and texts use the words of the glossary and of the field."""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PRODUCT = ("kvservice", "proto", "client", "engine_adapter")

#: Public class names with more than one definition, and why each is right.
SHARED_NAMES = {
    "BulkConnection": "the two ends of one connection to the bulk port; neither package imports the other",
    "Client": "the client library's connection, and the daemon's record of the same client",
    "Clock": "time as an input, in the daemon and in the client; neither package imports the other",
    "Lease": "the two sides of one lease: what the client holds, and what the daemon counts",
    "SessionHistory": "the two sides of one answer: what the client reads, and what the daemon leased for it",
    "Tier": "the client's name of a storage medium, and the daemon's interface to it",
}

#: The first version's private dialect. The message proposes a plain word.
BANNED = {
    r"whoever|whosever": "name the actor: the client, the daemon, the caller",
    r"nobody|no one": "say what does not happen: 'no client holds it'",
    r"whatever": "say which",
    r"somebody|someone": "name the actor",
    r"(?:is|are|was|were|be|been) told": "'receives', 'is called with', 'reads'",
    r"lets? go|letting go": "'releases', 'frees', 'evicts'",
    r"hears?": "'receives', 'learns'",
    r"anew": "'again'",
    r"foretold|foretells?": "'predicts', 'announces'",
    r"(?<!there )is (?-i:none)": "'is not valid', 'does not exist'",
    r"(?:bytes|blocks|tokens|turns|requests|sessions|times|returns|GB|GiB|MiB) a second": "'per second'",
    r"(?:one|two|three|four|[1-9]\d*) \w+ a (?:turn|row|block|layer|token|page|file|rank|second|request|look)": "'per'",
    r"once an? (?:second|minute|hour|day|turn|rank|combination|request)": "'once per'",
    r"\w+ a (?:shard|layer|token|block) each": "'per'",
    r"(?:goes|go|going|went|gone) on": "'continues'",
    r"(?:gives?|gave|given|giving) (?:it |them )?back": "'returns', 'releases', 'restores'",
    r"(?:lend|lends|lent|lending)": "'reserves', 'exports'",
    r"(?:brings?|brought|bringing|comes?|came) up": "'promotes'",
    r"on (?:its|their) way": "name the operation that runs: 'is being promoted', 'is being saved'",
    r"what (?:is|was|are) there": "name the things: 'the stored blocks'",
    r"(?-i:Who) (?!has access\b|was\b)\w+s": "name the actor: 'The waiting thread', 'A client that reads'",
    r"(?<=[,;] )for (?:it|they|he)": "'because'",
    r"(?-i:None|0|False|-1|Raises \w+)[.,:;]? where (?:there|it|they|nothing|no|none)": "'if'",
    r"becomes of": "say what happens",
    r"hangs? on|hung on": "'belongs to'",
    r"but for": "'except'",
    r"in the place of": "'instead of', 'replaces'",
    r"of no use": "'cannot be used'",
    r"(?:may|can|cannot|could|to) be had": "'is available'",
    r"as (?:often|many|much) as (?:it|they|he) may": "name the limit",
}
BANNED_WORD = re.compile("|".join(rf"\b(?:{words})\b" for words in BANNED), re.IGNORECASE)

FOLDERS = (
    "kvservice", "kvservice/index", "kvservice/policy", "kvservice/rpc", "kvservice/simulate",
    "kvservice/store", "kvservice/tiers", "client", "engine_adapter", "proto", "benchmarks", "examples", "tools",
    "tests", "docs", ".",
)  # fmt: skip


@functools.cache
def classes() -> dict[str, list[str]]:
    """Every public class of the product that was written by hand: its files by its name."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for folder in PRODUCT:
        for file in sorted((ROOT / folder).rglob("*.py")):
            if "_pb2" in file.name:
                continue
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    found[node.name].append(str(file.relative_to(ROOT)))
    return found


def test_a_class_name_has_one_meaning() -> None:
    twice = {name: files for name, files in classes().items() if len(files) > 1 and name not in SHARED_NAMES}

    assert not twice, "rename all but one, or say in SHARED_NAMES why one word is right"


@pytest.mark.parametrize("name", SHARED_NAMES)
def test_a_name_that_is_said_to_be_shared_is_defined_more_than_once(name: str) -> None:
    assert len(classes()[name]) > 1, f"take {name} out of SHARED_NAMES"


def files_of(folder: str) -> Iterator[Path]:
    """The texts of a folder; for a folder that contains others in FOLDERS, only the texts beside those."""
    nested = any(other != folder and (folder == "." or other.startswith(folder + "/")) for other in FOLDERS)
    for pattern in ("*.py", "*.md", "*.proto"):
        for file in (ROOT / folder).glob(pattern) if nested else (ROOT / folder).rglob(pattern):
            if "_pb2" not in file.name and file != Path(__file__) and file.name != "CHANGELOG.md":
                yield file


def texts_of(file: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and text. Of Python: comments, strings, and names of functions and classes; of protocol files: the
    comments; of other files: everything.
    """
    text = file.read_text()
    if file.suffix == ".py":
        before = ""
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in (tokenize.COMMENT, tokenize.STRING):
                yield token.start[0], token.string
            elif before in ("def", "class"):
                yield token.start[0], token.string.replace("_", " ")
            before = token.string
    elif file.suffix == ".proto":
        for number, line in enumerate(text.splitlines(), 1):
            yield number, line.partition("//")[2]
    else:
        yield from enumerate(text.splitlines(), 1)


def banned_in(folder: str) -> list[str]:
    return [
        f"{file.relative_to(ROOT)}:{line + text[: match.start()].count(chr(10))}: {match[0]}"
        for file in files_of(folder)
        for line, text in texts_of(file)
        for match in BANNED_WORD.finditer(text)
    ]


@pytest.mark.parametrize("folder", FOLDERS)
def test_texts_and_names_use_plain_words(folder: str) -> None:
    found = banned_in(folder)

    assert not found, "\n".join(["BANNED says what to write instead:", *found])
