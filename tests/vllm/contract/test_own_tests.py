"""vLLM's own tests of KV connectors, from its source distribution, with KVService configured as the connector."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.daemon import DaemonProcess

pytestmark = pytest.mark.fast

_SOURCES = Path(sys.prefix) / "vllm-0.33.0"
_UNIT = _SOURCES / "tests" / "v1" / "kv_connector" / "unit"
_PLUGIN = Path(__file__).parent / "own_tests"

RUN = (
    "test_cache_pollution_prevention.py",
    "test_config.py",
    "test_error_propagation.py",
    "test_hma_auto_config.py",
    "test_invalid_blocks_correctness.py",
    "test_kv_load_failure_recovery.py",
    "test_output_aggregator.py",
    "test_remote_prefill_lifecycle.py",
    "test_scheduler_kv_connector_override.py",
)

# Files that are not run, by what they test.
LEFT_OUT_FILES = {
    "another connector than ours": (
        "test_bidirectional_kv_transfer.py test_decode_bench_connector.py test_example_connector.py "
        "test_flexkv_connector.py test_hf3fs_client.py test_hf3fs_connector.py test_hf3fs_metadata_server.py "
        "test_hidden_states_connector.py test_hisparse_connector.py test_hisparse_stats.py test_lmcache_connector.py "
        "test_lmcache_integration.py test_mooncake_connector.py test_mooncake_connector_hma.py "
        "test_mooncake_connector_hybrid_mamba.py test_mooncake_proxy.py test_mooncake_stats.py "
        "test_mooncake_store_connector.py test_mooncake_store_coordinator.py test_mooncake_store_hma_e2e.py "
        "test_mooncake_store_layout.py test_mooncake_store_scheduler.py test_mooncake_store_worker.py "
        "test_moriio_connector.py test_moriio_hetero_tp_write.py test_moriio_hma_scheduler.py "
        "test_moriio_kv_layout.py test_moriio_proxy_routing.py test_moriio_read_tp.py test_moriio_routing.py "
        "test_moriio_routing_fairness.py test_moriio_toy_proxy_server.py test_moriio_tp_ack.py "
        "test_moriio_tp_mapping.py test_moriio_transfer_completion.py test_moriio_unmap.py "
        "test_moriio_write_done_routing.py test_multi_connector.py test_nixl_connector.py test_nixl_connector_hma.py "
        "test_nixl_desc_geometry.py test_nixl_heartbeat.py test_nixl_push_connector.py "
        "test_nixl_rocm_gpu_mem_diag.py test_nixl_simple_cpu_offload.py test_offloading_connector.py "
        "test_simple_cpu_offload_connector.py test_simple_cpu_offload_metrics.py test_umbp_async_lookup.py "
        "test_umbp_core.py test_umbp_events.py test_umbp_hybrid.py"
    ),
    "the transfer between engines, with ranks and handshakes, which ours has not": (
        "test_handshake_pp_aggregation.py test_tp_mapping.py test_transfer_topology_sharded.py"
    ),
    "a prefill whose KV another engine fetches: ours offers no KV to another engine": (
        "test_remote_decode_lifecycle.py"
    ),
    "that a recording wrapper of the example connector saw its calls; the rig's tests see ours": (
        "test_kv_connector_lifecycle.py"
    ),
}

# Tests that are not run, of the files that are.
_FROM_ANOTHER_ENGINE = "its hits come from the parameters of another engine (NIXL), which ours ignores"
_MAMBA = "its model has Mamba layers, which ours refuses"
_NO_MODEL = "its groups have layers of no model; the rig's tests have several groups"
_NO_GROUPS = "it checks a connector that does not take several KV cache groups, as ours does"
_ITS_OWN = "it checks what a connector of its own, or a named one, does"
LEFT_OUT = {
    "test_remote_prefill_lifecycle.py::test_basic_lifecycle": _FROM_ANOTHER_ENGINE,
    "test_remote_prefill_lifecycle.py::test_interleaved_lifecycle": _FROM_ANOTHER_ENGINE,
    "test_remote_prefill_lifecycle.py::test_no_spurious_prefix_caching": _FROM_ANOTHER_ENGINE,
    "test_remote_prefill_lifecycle.py::test_full_block_prompt": _FROM_ANOTHER_ENGINE,
    "test_remote_prefill_lifecycle.py::test_cannot_schedule_after_recv": _FROM_ANOTHER_ENGINE,
    "test_remote_prefill_lifecycle.py::test_cannot_recv": _FROM_ANOTHER_ENGINE,
    "test_remote_prefill_lifecycle.py::test_kv_fetch_stages_cleared_on_abort": _FROM_ANOTHER_ENGINE,
    "test_remote_prefill_lifecycle.py::test_p_side_chunked_prefill_mamba": _MAMBA,
    "test_remote_prefill_lifecycle.py::test_async_load_does_not_double_reserve_mamba_spec_blocks": _MAMBA,
    "test_remote_prefill_lifecycle.py::test_async_load_reserves_blocks_for_promotion_margin": _NO_MODEL,
    "test_kv_load_failure_recovery.py::test_block_level_load_failure_fails_closed_with_multiple_groups": _NO_MODEL,
    "test_hma_auto_config.py::test_hma_auto_config[non_hma_connector]": _NO_GROUPS,
    "test_hma_auto_config.py::test_hma_auto_config[multi_mixed]": _NO_GROUPS,
    "test_hma_auto_config.py::test_explicit_hma_with_non_hma_connector_errors_at_factory": _NO_GROUPS,
    "test_config.py::test_sleep_mode_refuses_unsupported_kv_connector": _ITS_OWN,
    "test_scheduler_kv_connector_override.py::test_connector_receives_block_hashes": _ITS_OWN,
    "test_scheduler_kv_connector_override.py::test_connector_block_state_covers_steps_without_new_blocks": _ITS_OWN,
}

needs_sources = pytest.mark.skipif(
    not _SOURCES.exists(), reason="vLLM's own tests are in .venv-vllm33, of the released vLLM"
)


@needs_sources
def test_vllms_own_tests_pass_with_ours_configured(tmp_path: Path) -> None:
    write_model(tmp_path / "facebook" / "opt-125m")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = cpu_test\n")
    deselected = [f"--deselect=tests/v1/kv_connector/unit/{each}" for each in LEFT_OUT]
    with DaemonProcess(tmp_path / "daemon") as daemon:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "kvservice_in_vllm_tests", "-p", "no:cacheprovider"]
            + ["-c", str(tmp_path / "pytest.ini"), f"--rootdir={_SOURCES}", f"--confcutdir={_UNIT}"]
            + deselected
            + [str(_UNIT / each) for each in RUN],
            cwd=tmp_path,  # Where vLLM's tests find their model, without a network.
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(map(str, (_PLUGIN, _SOURCES))),
                "KVSERVICE_ADDRESS": daemon.address,
                "HF_HUB_OFFLINE": "1",
                "VLLM_NO_USAGE_STATS": "1",
            },
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        with daemon.client() as client:
            assert client.admin.status().leases == 0
    assert done.returncode == 0, done.stdout
    counted = re.search(r"(\d+) passed(?:, (\d+) deselected)?", done.stdout)
    assert counted and int(counted[1]) >= 45 and int(counted[2]) >= len(LEFT_OUT), done.stdout[-2000:]


@needs_sources
def test_each_of_vllms_own_tests_is_run_or_left_out_for_a_reason() -> None:
    left_out = [name for names in LEFT_OUT_FILES.values() for name in names.split()]
    assert sorted([*RUN, *left_out]) == sorted(each.name for each in _UNIT.glob("test_*.py"))
    for each in LEFT_OUT:
        file, _, test = each.partition("::")
        assert f"def {test.partition('[')[0]}(" in (_UNIT / file).read_text(), each


def write_model(folder: Path) -> None:
    """The model that vLLM's tests name, with one layer and one head, as their KV cache has."""
    folder.mkdir(parents=True)
    settings = {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "ffn_dim": 64,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(settings))
