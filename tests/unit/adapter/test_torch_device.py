"""The device that copies with torch keeps the contract; here on tensors of the CPU."""

from __future__ import annotations

import pytest
import torch

from kvservice_adapter.device.base import NotOrdered, NotTurned
from kvservice_adapter.device.cpu import CpuDevice
from kvservice_adapter.device.cuda import CudaUnavailable
from kvservice_adapter.device.rotation import Rotation
from kvservice_adapter.torch_device import TorchDevice, device_for, turn
from tests.contracts.device import DeviceContract, numbering


class TestTorchDevice(DeviceContract):
    @pytest.fixture
    def device(self) -> TorchDevice:
        return TorchDevice()


def test_a_model_on_a_gpu_that_cupy_cannot_use_is_served_by_torch_and_a_line_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(ordinal: int, current_stream: object) -> None:
        raise CudaUnavailable(f"no CuPy for GPU {ordinal}")

    monkeypatch.setattr("kvservice_adapter.torch_device.open_device", refuse)

    assert isinstance(device_for(torch.device("cuda", 3)), TorchDevice)

    assert "slowly: no CuPy for GPU 3" in caplog.text
    assert "extra cuda13" in caplog.text
    assert type(device_for(torch.device("cpu"))) is CpuDevice


@pytest.mark.parametrize("is_capturing", [True, False])
def test_no_event_is_recorded_while_a_graph_is_captured_and_none_that_fails_is_an_error(
    monkeypatch: pytest.MonkeyPatch, is_capturing: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    monkeypatch.setattr(torch, "Event", _no_event)

    computed = TorchDevice(torch.device("cuda", 0)).computed()

    with pytest.raises(NotOrdered, match="graph" if is_capturing else "no event can be recorded: out of memory"):
        computed.check()


def _no_event(device: torch.device) -> None:
    raise RuntimeError("out of memory")


class FailingDevice(CpuDevice):
    def rotate(self, keys: torch.Tensor, rotation: Rotation) -> None:
        raise NotTurned("out of memory")


def test_keys_that_a_device_fails_to_turn_are_turned_by_the_processor(caplog: pytest.LogCaptureFixture) -> None:
    keys = torch.ones(1, 2, 20, 8)

    turn(FailingDevice(), keys[:, :, 4:], numbering(16))

    assert torch.equal(keys[0, 0, 4:, 0], torch.arange(1.0, 17.0))
    assert torch.all(keys[:, :, :4] == 1)
    assert "slowly: out of memory" in caplog.text
