"""Engines that compute with torch on a GPU: what the simulated device cannot show, because torch has no CUDA there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvservice_adapter.device.arrays import CUDA, view_of
from kvservice_adapter.device.base import NotOrdered, Pages
from kvservice_adapter.device.cuda import CudaDevice
from kvservice_adapter.torch_device import device_for
from kvservice_api.cuda.runtime import allocation_of
from tests.contracts.device import DTYPES, HEADS, K_DIM, V_DIM, WAIT_S, DeviceContract, noise, stored_token
from tests.daemon import DaemonProcess, until
from tests.process_starter import python_path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no CUDA here"),
]
PLACE = torch.device("cuda", 0)
cuda: Any = torch.cuda  # Parts of it have no types.
SLOW_CYCLES = 200_000_000  # Of the GPU: about a tenth of a second.
TOKENS = 40


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    found = device_for(PLACE)
    assert isinstance(found, CudaDevice)
    return found


def empty_pages(dtype: torch.dtype = torch.float32) -> Pages:
    """The run's tokens are in the pages 2, 0 and 1 of 16 tokens."""
    keys, values = (torch.zeros(3, HEADS, 16, dim, dtype=dtype, device=PLACE) for dim in (K_DIM, V_DIM))
    return Pages(keys, values, [2, 0, 1])


def slices_of(dtype: torch.dtype = torch.float32) -> Any:
    """Stored slices of the run, in blocks of 16, 16 and 8 tokens."""
    return noise(TOKENS * HEADS * (K_DIM + V_DIM) * dtype.itemsize)


def holds(pages: Pages, slices: Any, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the pages have what the slices store, to the bit."""
    for token in range(TOKENS):
        page, at = pages.page_ids[token // 16], token % 16
        for array, stored in zip(
            (pages.keys, pages.values), stored_token(slices, [16, 16, 8], token, dtype), strict=True
        ):
            ours = array[page, :, at].contiguous().view(torch.uint8).cpu()
            if not torch.equal(ours, stored.contiguous().view(torch.uint8)):
                return False
    return True


class TestTorchTensorsOnCuda(DeviceContract):
    """The contract of all devices, with tensors on the GPU."""

    @pytest.fixture
    def device(self) -> CudaDevice:
        found = device_for(PLACE)
        assert isinstance(found, CudaDevice)
        return found

    def place(self, tensor: torch.Tensor) -> Any:
        placed = tensor.to(PLACE)
        torch.cuda.synchronize()
        return placed

    def read(self, array: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        on_host: torch.Tensor = array.cpu()
        return on_host


# Tensors, without copies


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensors_place_shape_and_type_are_known_by_dlpack(dtype: torch.dtype) -> None:
    tensor = torch.ones(4, 6, 8, device=PLACE).to(dtype)[:, 1:5].transpose(0, 1)

    view = view_of(tensor)

    strides = tuple(stride * tensor.element_size() for stride in tensor.stride())
    assert (view.address, view.shape, view.strides) == (tensor.data_ptr(), tuple(tensor.shape), strides)
    assert (view.dtype, view.device, view.is_on_host) == (str(dtype).removeprefix("torch."), (CUDA, 0), False)


def test_a_tensor_that_requires_gradients_is_read_all_the_same() -> None:
    tensor = torch.ones(2, 3, device=PLACE, requires_grad=True)

    assert view_of(tensor).address == tensor.data_ptr()


def test_the_allocator_of_torch_carves_tensors_from_allocations_that_are_found() -> None:
    tensors = [torch.ones(1000, device=PLACE) for _ in range(4)]

    found = {allocation_of(tensor.data_ptr()) for tensor in tensors}

    assert all(any(base <= tensor.data_ptr() < base + size for base, size in found) for tensor in tensors)
    assert len(found) < len(tensors)


# Order with the engine's work


def test_a_save_begins_after_what_torchs_current_stream_was_given(device: CudaDevice) -> None:
    stream, pages, into = device.stream("torch-save"), empty_pages(), np.zeros_like(slices_of())
    engine = cuda.Stream(PLACE)
    engine.wait_stream(torch.cuda.current_stream(PLACE))

    with torch.cuda.stream(engine):
        cuda._sleep(SLOW_CYCLES)
        pages.keys.fill_(3.0)
        pages.values.fill_(4.0)
        stream.after(device.computed())
        event = stream.gather(pages, [16, 16, 8], into)

    assert event.wait(WAIT_S)
    assert event.error is None
    for token in range(TOKENS):
        keys, values = stored_token(into, [16, 16, 8], token, torch.float32)
        assert bool((keys == 3.0).all())
        assert bool((values == 4.0).all())


def test_a_load_writes_after_what_torchs_current_stream_was_given(device: CudaDevice) -> None:
    stream, pages, slices = device.stream("torch-load"), empty_pages(), slices_of()
    cuda._sleep(SLOW_CYCLES)
    pages.keys.fill_(3.0)
    pages.values.fill_(3.0)

    stream.after(device.computed())
    event = stream.scatter(slices, [16, 16, 8], pages)

    assert event.wait(WAIT_S)
    torch.cuda.synchronize()
    assert holds(pages, slices)


def test_what_torchs_current_stream_is_given_after_a_wait_reads_the_loaded_layer(device: CudaDevice) -> None:
    stream, pages, slices = device.stream("torch-load"), empty_pages(), slices_of()
    torch.cuda.synchronize()

    event = stream.scatter(slices, [16, 16, 8], pages)
    assert device.wait_in_compute(event, WAIT_S)
    copies = pages.keys.clone(), pages.values.clone()  # On the GPU, without a wait of the host.

    torch.cuda.synchronize()
    assert holds(Pages(*copies, pages.page_ids), slices)


def test_the_engines_device_is_the_same_after_each_call(device: CudaDevice) -> None:
    before = torch.cuda.current_device()

    stream, pages = device.stream("torch-load"), empty_pages()
    stream.after(device.computed())
    assert device.wait_in_compute(stream.scatter(slices_of(), [16, 16, 8], pages), WAIT_S)

    assert torch.cuda.current_device() == before


# CUDA graphs


def test_a_capture_continues_while_layers_are_loaded_and_the_graph_has_nothing_of_ours(device: CudaDevice) -> None:
    stream, pages, slices = device.stream("torch-load"), empty_pages(), slices_of()
    given, graph = torch.ones(1000, device=PLACE), torch.cuda.CUDAGraph()
    warm_up = cuda.Stream(PLACE)
    with torch.cuda.stream(warm_up):  # As torch asks for before a capture.
        given * 2
    torch.cuda.synchronize()

    with torch.cuda.graph(graph):
        doubled = given * 2
        event = stream.scatter(slices, [16, 16, 8], pages)
        assert device.wait_in_compute(event, WAIT_S)
        with pytest.raises(NotOrdered):
            stream.after(device.computed())
        doubled += 1
    given.fill_(5.0)
    graph.replay()

    torch.cuda.synchronize()
    assert bool((doubled == 11.0).all())
    assert holds(pages, slices)


def test_after_a_capture_saves_are_ordered_again(device: CudaDevice) -> None:
    graph, given = torch.cuda.CUDAGraph(), torch.ones(1000, device=PLACE)
    with torch.cuda.graph(graph):
        given * 2

    device.computed().check()


# Memory that other processes cannot open

_EXPORT = """
import torch
from kvservice_adapter.device.arrays import view_of
from kvservice_adapter.device.cuda_ipc import IpcPages
from kvservice_api.cuda.runtime import Gpu
from kvservice_api.errors import DeviceUnavailable

keys, values = (view_of(torch.zeros(64, 8, 16, 128, device="cuda")) for _ in range(2))
try:
    request = IpcPages(Gpu(0), [keys], [values], [0]).description()
except DeviceUnavailable as error:
    print("refused:", error)
else:
    offsets = [layer.keys.offset_bytes for layer in request.layers]
    print("exported:", len(request.allocations), offsets)
"""


@pytest.mark.parametrize(("setting", "expected"), [("True", "refused:"), ("False", "exported:")])
def test_expandable_segments_are_refused_with_the_setting_to_change(setting: str, expected: str) -> None:
    # torch 2.9 has renamed the variable; older versions read the other one.
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    environment = {**os.environ, **dict.fromkeys(names, f"expandable_segments:{setting}")}
    environment["PYTHONPATH"] = python_path()

    done = subprocess.run([sys.executable, "-c", _EXPORT], capture_output=True, text=True, env=environment, timeout=120)

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(expected), done.stdout
    if expected == "refused:":
        assert "PYTORCH_ALLOC_CONF=expandable_segments:False" in done.stdout


# Connectors


def test_a_transformers_model_on_the_gpu_saves_and_restores_its_history_there(daemon: DaemonProcess) -> None:
    pytest.importorskip("transformers")
    from tests.unit.connector_models import BLOCK_TOKENS, computed, connector, prompt, states, tiny_llama

    model, tokens = tiny_llama(torch.bfloat16).to(PLACE), prompt(6 * BLOCK_TOKENS + 1).to(PLACE)
    cache = computed(model, tokens)
    with daemon.client() as client:
        subject = connector(client, model)
        assert subject.save(tokens, cache).stored == 7

        restored = subject.restore(tokens)

        assert (restored.tokens, restored.error) == (6 * BLOCK_TOKENS, None)
        for before, after in zip(states(cache), states(restored.cache), strict=True):
            for ours, theirs in zip(before, after, strict=True):
                assert theirs.device == PLACE
                assert torch.equal(ours[:, :, : restored.tokens], theirs)
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
        again = model.generate(tokens, **options)
        continued = model.generate(tokens, past_key_values=subject.restore(tokens).cache, **options)
        assert torch.equal(again, continued)
        subject.close()


def test_a_vllm_on_the_gpu_loads_a_prompt_that_it_saved(
    new_daemon: Callable[..., DaemonProcess], tmp_path: Path
) -> None:
    vllm = pytest.importorskip("vllm")
    from transformers import LlamaConfig
    from vllm.config import KVTransferConfig

    shape: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 1000,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "dtype": "bfloat16",
    }
    LlamaConfig(**shape).save_pretrained(tmp_path / "model")
    daemon = new_daemon()
    engine = vllm.LLM(
        model=str(tmp_path / "model"),
        load_format="dummy",
        skip_tokenizer_init=True,
        gpu_memory_utilization=0.2,
        max_model_len=1024,
        kv_transfer_config=KVTransferConfig(
            kv_connector="KVServiceConnector",
            kv_connector_module_path="kvservice_adapter.connectors.vllm",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"address": daemon.address, "lookup_wait_s": 30.0, "wait_s": 30.0},
        ),
    )
    ids = np.random.default_rng(0).integers(3, 1000, 600).tolist()
    answer = partial(
        engine.generate,
        [{"prompt_token_ids": ids}],
        vllm.SamplingParams(temperature=0.0, max_tokens=8, detokenize=False, ignore_eos=True),
        use_tqdm=False,
    )

    (first,) = answer()
    engine.reset_prefix_cache()
    with daemon.client() as client:
        until(lambda: len(list(client.admin.list_blocks())) >= 2)
    (second,) = answer()

    assert not first.num_cached_tokens
    assert second.num_cached_tokens >= 512
    assert second.outputs[0].token_ids == first.outputs[0].token_ids
