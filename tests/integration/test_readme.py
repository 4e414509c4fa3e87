"""Every block of commands and code in README.md runs as pasted, against a daemon at another address.

What a test cannot do is left out of it: installations, the network, and 24 GiB of the machine.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvservice_api.errors import KVError
from kvservice_client import Client
from tests.daemon import DaemonProcess, until

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
PROGRAMS = Path(sys.executable).parent
MIB = 2**20


def block(first_words: str, language: str = "sh") -> str:
    [found] = [text for kind, text in BLOCKS if kind == language and first_words in text]
    return str(found)


def commands(first_words: str) -> list[list[str]]:
    """The words of each command of a block, without comments."""
    text = re.sub(r"(?m)(^|\s)#.*$", "", block(first_words))
    lines = re.findall(r"(?:[^'\n]|'[^']*')+", text)  # A quoted text may go over several lines.
    return [words for line in lines if (words := shlex.split(line))]


def test_every_block_has_a_test_here() -> None:
    tested = {"make demo", "pip install", "kvservice serve", "kvctl status", "block_chain(", "vllm serve"}
    tested |= {"TransformersConnector(", "kvctl simulate"}
    assert all(sum(each in text for each in tested) == 1 for _, text in BLOCKS)
    assert len(BLOCKS) == len(tested)


def test_the_targets_of_make_exist() -> None:
    for words in commands("make demo"):
        assert subprocess.run([words[0], "-n", *words[1:]], cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_the_extras_that_are_installed_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for words in commands("pip install"):
        assert words[:2] == ["pip", "install"] and words[2].startswith(".") and len(words) == 3
        named = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[2])
        assert named is not None and set((named[1] or "cli").split(",")) <= set(extras)


def test_the_daemon_starts_and_kvctl_shows_its_status(tmp_path: Path) -> None:
    [serve], [status] = commands("kvservice serve"), commands("kvctl status")
    socket = tmp_path / "kvservice" / "kvservice.sock"
    smaller = {
        "dram.capacity_bytes": 64 * MIB,
        "dram.path": tmp_path,
        "ssd.capacity_bytes": 64 * MIB,
        "server.address": "127.0.0.1:0",
        "server.metrics_address": "",
    }
    environment = {**os.environ, "HOME": str(tmp_path), "KVCTL_ADDRESS": str(socket)}
    arguments = [word.replace("~", str(tmp_path)) for word in serve[1:]]  # As the shell does.
    flags = [f"--{name}={value}" for name, value in smaller.items()]
    running = subprocess.Popen(
        [PROGRAMS / serve[0], *arguments, *flags], env=environment, stderr=subprocess.DEVNULL, cwd=tmp_path
    )
    try:
        until(lambda: is_answering(str(socket)), 30)
        done = subprocess.run(
            [PROGRAMS / status[0], *status[1:]], env=environment, capture_output=True, text=True, check=True
        )
        assert "serving" in done.stdout
    finally:
        running.terminate()
        assert running.wait(30) == 0


def is_answering(address: str) -> bool:
    with Client(address, timeout_s=0.5, reconnect_wait_s=0.0) as client:
        try:
            client.capabilities()
        except KVError:
            return False
    return True


def test_blocks_are_saved_and_loaded(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = new_daemon(dram__capacity_bytes=160 * MIB)
    exec(block("block_chain(", "python").replace("127.0.0.1:7070", daemon.address), {})
    with daemon.client() as client:
        counters = client.admin.status().counters
        assert (counters["save_blocks_stored"], counters["lookup_blocks_hit"]) == (3, 3)


def test_the_connector_saves_what_a_model_of_the_hub_has_computed(
    new_daemon: Callable[..., DaemonProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    import transformers

    from examples.models import tiny_model

    daemon = new_daemon()
    tiny = tiny_model()
    tiny.model.config._commit_hash = "a commit"  # What the hub sends with a model.

    def tokenizer(text: str, return_tensors: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=torch.tensor([list(text.encode())]))

    for name, value in (("AutoModelForCausalLM", tiny.model), ("AutoTokenizer", tokenizer)):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", lambda _, found=value: found)
    code = block("TransformersConnector(", "python").replace("127.0.0.1:7070", daemon.address)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["history"].tokens == 0, "nothing was stored before"
    exec(code, names)
    assert names["history"].tokens == 6 * 256, "the second run loads what the first has saved"
    names["connector"].close()
    names["client"].close()


def test_vllm_is_given_settings_that_the_connector_has() -> None:
    [words] = commands("vllm serve")
    given = json.loads(words[words.index("--kv-transfer-config") + 1])
    module = ROOT / "engine_adapter" / f"{given['kv_connector_module_path'].replace('.', '/')}"
    assert f"class {given['kv_connector']}(" in (module / "connector.py").read_text()
    assert given["kv_load_failure_policy"] == "recompute"
    settings = re.findall(r"(?m)^    (\w+): ", (module / "settings.py").read_text())  # Its import needs vLLM.
    assert set(given["kv_connector_extra_config"]) <= set(settings)


def test_the_simulations_run_and_say_on_stderr_what_takes_long() -> None:
    for words in commands("kvctl simulate"):
        done = subprocess.run([PROGRAMS / words[0], *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
        assert all(re.match(r"kvctl: simulating \w+ with [\d.]+ GiB of D", line) for line in done.stderr.splitlines())
        assert "…" not in done.stdout
