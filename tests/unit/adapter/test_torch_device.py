"""The device that copies with torch keeps the contract; here on tensors of the CPU."""

from __future__ import annotations

import pytest

from kvservice_adapter.torch_device import TorchDevice
from tests.contracts.device import DeviceContract


class TestTorchDevice(DeviceContract):
    @pytest.fixture
    def device(self) -> TorchDevice:
        return TorchDevice()
