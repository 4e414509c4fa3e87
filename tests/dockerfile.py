"""Parses a Dockerfile for the tests of the images."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Instruction(NamedTuple):
    name: str
    value: str

    @property
    def words(self) -> list[str]:
        """The words of the JSON form, or the words that a shell would get."""
        found = re.search(r"\[.*\]$", self.value)
        return json.loads(found[0]) if found else shlex.split(self.value)


class Stage(NamedTuple):
    """From one FROM to the next."""

    instructions: list[Instruction]

    def all(self, name: str) -> list[Instruction]:
        return [each for each in self.instructions if each.name == name]

    def only(self, name: str) -> Instruction:
        (found,) = self.all(name)
        return found

    @property
    def environment(self) -> dict[str, str]:
        pairs = (word.partition("=") for each in self.all("ENV") for word in each.words)
        return {name: value for name, _, value in pairs}


def stages(file: str = "Dockerfile") -> list[Stage]:
    """The first stage has the lines before the first FROM. `file` is relative to the repository's root."""
    text = re.sub(r"^#.*\n", "", (ROOT / file).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found = [Stage([])]
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, value = line.partition(" ")
        if name == "FROM":
            found.append(Stage([]))
        found[-1].instructions.append(Instruction(name, re.sub(r"\s+", " ", value.strip())))
    return found


def let_through() -> set[str]:
    """The entries of the repository's root that .dockerignore does not exclude."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    return {line.removeprefix("!") for line in lines if line.startswith("!")}
