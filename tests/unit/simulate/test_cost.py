"""The paper's prices, and its savings from its own speedups."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvservice.simulate import cost
from kvservice.simulate.settings import GIB, Machine

#: The model's GPUs, how many times less GPU time it took with the cache, and the saving and the share of storage in
#: the cost that the paper reports, in percent.
PAPER = {
    "LLaMA-13B": (2, 4.0, 70, 16.4),
    "LLaMA-65B": (4, 1.9, 43, 9.0),
    "LLaMA-70B": (4, 3.3, 66, 9.0),
    "Falcon-40B": (4, 3.4, 68, 9.0),
}


@pytest.mark.parametrize("model", PAPER)
def test_the_papers_speedups_give_the_papers_savings(model: str) -> None:
    gpus, speedup, saving, share = PAPER[model]
    cached = Machine(128 * GIB, 10240 * GIB, 5.0 * GIB, 2**20, gpus=gpus)
    recomputed = replace(cached, dram_bytes=0, ssd_bytes=0)
    saved = 1 - cost.dollars(1.0, cached) / cost.dollars(speedup, recomputed)
    assert saved * 100 == pytest.approx(saving, abs=1)
    assert cost.storage_share(cached) * 100 == pytest.approx(share, abs=0.1)
    assert cost.storage_share(recomputed) == 0
