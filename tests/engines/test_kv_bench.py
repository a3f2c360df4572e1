"""The benchmark of the KV memory on a tiny model: its books add up, and it sees what sharing saves."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from core.bundle import Bundle, ModelInfo
from engines.speed import kv_cache
from kernels.build import native
from kernels.kv_memory.layout import KVLayout
from kernels.kv_memory.region import PAGE_GROUP, reservations_work
from kernels.kv_memory.reservation_pool import ReservationPool
from kernels.kv_memory.shared_prefix import sharing_works

pytestmark = pytest.mark.skipif(not reservations_work() or not sharing_works() or native().library is None, reason="NOT RUN: no reservations, no sealed files in memory, or no compiler")
LAYERS, TOKEN = 2, 4 * 64 * 2  # bytes of a token in one part, in bfloat16: 128 tokens a page group


@pytest.fixture
def tiny(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_shape(name: str, dtype: str) -> Bundle:
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=8064, hidden_size=256, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64)
        return Bundle(LlamaForCausalLM(config).to(getattr(torch, dtype)).eval(), tokenizer, ModelInfo(name, None, dtype, "local"))

    monkeypatch.setattr(kv_cache, "load_shape", load_shape)


@pytest.mark.usefixtures("tiny")
def test_its_books_add_up() -> None:
    row = kv_cache.measure_kv("tiny", context=4096, tokens=300, prefix=256, rounds=1)["rows"][0]
    assert row["reserved_bytes"] == LAYERS * 2 * 4096 * TOKEN and row["regions"] == LAYERS * 2
    assert row["used_bytes"] == LAYERS * 2 * 300 * TOKEN and row["copied_bytes"] == 0 < row["growing_copied_bytes"]
    assert row["committed_bytes"] == LAYERS * 2 * 4 * PAGE_GROUP == (row["waited_pages"] + row["ahead_pages"]) * 4096
    assert row["runs"] == 2 and row["steps_with_commits"] == 2 * 2
    assert row["shared_shared_bytes"] == row["shared_in_file_bytes"] == LAYERS * 2 * 2 * PAGE_GROUP and row["anew_shared_bytes"] == 0
    assert row["anew_own_bytes"] - row["shared_own_bytes"] == row["shared_shared_bytes"]
    assert row["anew_grown_bytes"] - row["shared_grown_bytes"] > row["shared_shared_bytes"] // 2, "memory that was measured, not counted"
    assert row["logits_apart_of_spread"] < 0.1  # bfloat16 products over other numbers of rows


def test_steps_with_commits_are_those_that_ask_for_a_page_group(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = KVLayout(3, 3, 50, torch.float32)  # 600 bytes a token: page groups end within tokens
    cache, asked, steps = ReservationPool((layout,), 2000).cache(), [], set()
    monkeypatch.setattr("kernels.kv_memory.storage.COMMITTER.commit_soon", lambda region, size: asked.append((region, size)))
    for step in range(500):
        cache.update(torch.ones(1, 3, 1, 50), torch.ones(1, 3, 1, 50), 0)
        if asked:
            steps.add(step)
        for region, size in asked:  # done while the step computes
            region.commit_to(size)
        asked.clear()
    assert steps - {0} == kv_cache._steps_with_commits(cache, 500)
