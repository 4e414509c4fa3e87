"""The GPU, its driver and its link, as the driver's tools name them."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

_LINK = ("pcie.link.gen.max", "pcie.link.width.max", "pcie.link.gen.current")
_FIELDS = ("name", "driver_version", "memory.total", *_LINK)


def described() -> str:
    """One sentence on the device 0 of this process: name, driver, CUDA, link. What cannot be read is left out."""
    parts = _by_nvidia_smi() or _by_cuda()
    return f"{', '.join(parts)}." if parts else "No CUDA device."


def _by_nvidia_smi() -> list[str]:
    """The link's generation falls while the GPU is idle, so the largest possible one is named too."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        name, driver, memory, generation, width, now = (each.strip() for each in done.stdout.split(","))
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
    link = f"PCIe generation {generation} x{width} (generation {now} when it was asked)"
    return [name, memory, f"driver {driver}", link, *_versions()]


def _by_cuda() -> list[str]:
    try:
        from cupy.cuda import runtime

        found = runtime.getDeviceProperties(0)
    except Exception:  # No CuPy, no driver, no device: all the same here.
        return []
    return [found["name"].decode(), f"{found['totalGlobalMem'] >> 20} MiB", *_versions()]


def _versions() -> list[str]:
    parts = []
    try:
        import cupy
        from cupy.cuda import runtime

        parts.append(f"CUDA {_dotted(runtime.driverGetVersion())} by the driver, CuPy {cupy.__version__}")
    except Exception:  # As above: there is no CUDA to name.
        pass
    if (torch := _torch()) is not None and torch.version.cuda:
        parts.append(f"torch {torch.__version__}")
    return parts


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        return None
    return torch
