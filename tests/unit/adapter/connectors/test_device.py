"""The connector receives its device; only the device moves KV; a model keeps no hooks of the connector."""

from __future__ import annotations

import ast
import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import kvservice_adapter
from kvservice_adapter.device.arrays import ArrayView
from kvservice_adapter.device.cpu import CpuDevice
from kvservice_adapter.torch_device import TorchDevice, device_for
from tests.unit.connector_models import KeptBlocks, connector, prompt, tiny_llama

_MOVES = {"cpu", "cuda", "to", "pin_memory", "numpy", "item", "tolist"}
# The host must read these numbers: block keys are hashes of token ids, and depend on masks and positions.
_TOKENS_ON_HOST = {"forward_saver._on_host", "forward_saver._read", "forward_saver._are_counted"}
# These probe a model when the connector is made, or prepare the model's input for a recomputed history.
_NOT_IN_A_FORWARD = {"model_layout", "model_probe", "rows", "unrotated", "generation"}
_IDS_FOR_A_MODEL = {"recompute._forward", "recompute._cut"}


class CountingDevice(CpuDevice):
    def __init__(self) -> None:
        self.arrays = 0

    def bits(self, view: ArrayView) -> Any:
        self.arrays += 1
        return super().bits(view)


def hooks_of(model: Any) -> int:
    modules = list(model.modules())
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in modules)


@pytest.mark.parametrize("rotated", [True, False])
def test_all_kv_is_copied_by_the_device_that_is_given(rotated: bool) -> None:
    model, ids, kept, device = tiny_llama(), prompt(18), KeptBlocks(), CountingDevice()
    subject = connector(kept, model, device=device, rotated=rotated)
    cache = subject.restore(ids).cache
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    assert subject.save(ids, cache).stored == 5
    saves = 2 * 2  # Keys and values of each layer; the whole blocks while they are computed, then the partial one.
    assert device.arrays == saves * model.config.num_hidden_layers

    again = subject.restore(ids).cache
    with torch.inference_mode():
        model(ids[:, 17:], past_key_values=again)

    copies = 2 if rotated else 4  # Also keys before rotation.
    assert device.arrays == (saves + copies) * model.config.num_hidden_layers


def test_the_default_device_is_chosen_by_where_the_model_lies() -> None:
    assert type(device_for(torch.device("cpu"))) is CpuDevice
    assert type(device_for(torch.device("cuda", 0))) is TorchDevice


def test_no_line_on_the_path_of_a_forward_moves_kv_between_devices() -> None:
    """Pipelines and devices cannot import torch (an import contract); this test checks the connector."""
    folder = Path(kvservice_adapter.__file__).parent / "connectors" / "transformers"
    found = set()
    for file in folder.glob("*.py"):
        for name, call in _method_calls(ast.parse(file.read_text())):
            if call in _MOVES and file.stem not in _NOT_IN_A_FORWARD:
                found.add(f"{file.stem}.{name}")
    assert found - _IDS_FOR_A_MODEL == _TOKENS_ON_HOST


def _method_calls(tree: ast.Module) -> list[tuple[str, str]]:
    """(function, method that it calls) for every call of a method in a file."""
    return [
        (function.name, node.func.attr)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]


@pytest.mark.parametrize("rotated", [True, False])
def test_a_model_keeps_no_hooks_once_the_connector_and_its_caches_are_gone(rotated: bool) -> None:
    model, ids = tiny_llama(), prompt(18)
    subject = connector(KeptBlocks(), model, rotated=rotated)
    cache: Any = subject.restore(ids).cache
    subject.close()
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    assert not cache.saver.stopped, "the cache still works, and is called for its forwards"
    assert hooks_of(model)

    del subject, cache
    gc.collect()

    assert not hooks_of(model)
