"""``kvctl bench`` runs and prints what it promises. The figures themselves are not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.client import parts
from tests import process_starter
from tests.process_starter import python_path

KVCTL = [sys.executable, "-c", "from kvctl import main; main()"]


def kvctl(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The same with its imports done, for what is refused before a measure."""
    environment = {**os.environ, "PYTHONPATH": python_path()}
    return process_starter.run("tests.kvctl", arguments, environment=environment, timeout=120)


FIGURES = (
    "memcpy_gbps tcp_gbps tls_gbps bulk_load_ratio bulk_save_ratio bulk_tls_load_ratio bulk_first_layer_us_p50 "
    "bulk_load_cpu_s_per_gb bulk_save_cpu_s_per_gb "
    "grpc_load_ratio grpc_save_ratio shm_load_ratio shm_save_ratio shm_view_ms_1gib "
    "hit_256_us_p50 rpc_empty_us_p50 lookup_512_ratio local_lookup_us_per_key index_put_ratio index_get_ratio"
).split()
DISK_FIGURES = (
    "odirect_read_gbps odirect_write_gbps ssd_read_ratio ssd_write_ratio cold_first_layer_ratio "
    "bulk_cold_first_layer_ratio grpc_cold_first_layer_ratio"
).split()


@pytest.mark.slow
def test_a_quick_run_prints_every_figure_as_json_and_writes_the_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    command = [*KVCTL, "bench", "--quick", "--json", "--directory", str(tmp_path), "--write", str(page)]

    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)

    report = json.loads(done.stdout)
    assert all(report[name] > 0 for name in FIGURES)
    on_disk = [report[name] for name in DISK_FIGURES]
    assert all(on_disk) or on_disk == [None] * len(on_disk), "all of them, or none on a tmpfs"
    assert report["settings"]["tcp_gbps"]
    assert report["spreads"]["tcp_gbps"] >= 0
    assert "`grpc_load_ratio`" in page.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.md"], "what it wrote elsewhere is gone"


def test_a_folder_that_is_not_there_is_refused() -> None:
    done = kvctl("bench", "--directory", "/nowhere")

    assert done.returncode == 2
    assert "/nowhere is no folder" in done.stderr


LAYER_GROUPS = {
    "modelId": "bench/gemma-like",
    "blockTokens": 64,
    "groups": [
        {"layers": 2, "kvHeads": 8, "kHeadDim": 64, "vHeadDim": 64, "dtype": "bfloat16", "window": 512,
         "rotary": {"kind": "none", "pairing": "half"}},
        {"layers": 1, "kvHeads": 2, "kHeadDim": 128, "vHeadDim": 128, "dtype": "bfloat16",
         "rotary": {"kind": "none", "pairing": "half"}},
    ],
}  # fmt: skip


@pytest.mark.slow
def test_blocks_of_a_layout_of_ones_own_are_moved(tmp_path: Path) -> None:
    layout = tmp_path / "layout.json"
    layout.write_text(json.dumps(LAYER_GROUPS))
    command = [*KVCTL, "bench", "--quick", "--json", "--directory", str(tmp_path), "--layout", str(layout)]

    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)

    report = json.loads(done.stdout)
    assert all(report[name] > 0 for name in FIGURES)


@pytest.mark.parametrize(
    ("text", "problem"),
    [(None, "No such file"), ("{", "is not a layout"), ('{"layers": 3}', "is not a layout"), ("[]", "is not a layout")],
)
def test_a_file_that_is_no_layout_is_refused(tmp_path: Path, text: str | None, problem: str) -> None:
    path = tmp_path / "layout.json"
    if text is not None:
        path.write_text(text)

    done = kvctl("bench", "--layout", str(path))

    assert done.returncode == 2
    assert problem in " ".join(done.stderr.replace("│", " ").split())


def test_a_measure_that_fails_says_why_and_the_program_continues(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    with parts.parts(folder, tmp_path, quick=True) as programs:
        assert programs.measure("index")["put_per_s"] > 0
        folder.rmdir()
        for name in ("ssd", "cold"):
            with pytest.raises(parts.MeasureFailed, match="FileNotFoundError"):
                programs.measure(name)


def test_a_daemon_that_is_not_there_is_said_so() -> None:
    done = kvctl("bench", "--quick", "--address", "127.0.0.1:1")

    assert done.returncode == 1
    assert "127.0.0.1:1" in done.stderr


@pytest.mark.parametrize("option", ["--directory", "--dram-path"])
def test_a_folder_for_a_daemon_that_is_not_started_is_refused(option: str, tmp_path: Path) -> None:
    done = kvctl("bench", "--quick", "--address", "127.0.0.1:1", option, str(tmp_path))

    assert done.returncode == 2
    assert option in done.stderr
    assert "--address names another" in done.stderr
