"""Token-major KV memory: what it keeps, what it costs, and what happens when there is none."""

from __future__ import annotations

import gc
import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from core.errors import InvalidRequest, OutOfMemory
from kernels.kv_memory import region
from kernels.kv_memory.cache import TokenMajorCache, growing_cache
from kernels.kv_memory.layout import KVLayout
from kernels.kv_memory.region import PAGE_GROUP, Region, reservations_work
from kernels.kv_memory.reservation_pool import ReservationPool
from kernels.kv_memory.storage import ReservedStorage
from tests.tolerances import INT8_KV

needs_reservations = pytest.mark.skipif(not reservations_work(), reason="NOT RUN: this system does not reserve memory without committing it")
LAYOUT = KVLayout(2, 2, 16, torch.float32)


def caches(layout: KVLayout, layers: int = 2, context: int = 400) -> list[TokenMajorCache]:
    made = [growing_cache((layout,) * layers)]
    return [*made, ReservationPool((layout,) * layers, context).cache()] if reservations_work() else made


def states(layout: KVLayout, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(1, layout.k_heads, tokens, layout.head_dim, generator=generator)
    v = torch.randn(1, layout.v_heads, tokens, layout.v_head_dim or layout.head_dim, generator=generator)
    return (k, v) if layout.scaled else (k.to(layout.dtype), v.to(layout.dtype))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([(1, 4, 8, 8), (2, 2, 16, 16), (4, 1, 5, 3)]))
def test_keeps_what_transformers_cache_keeps(pieces: list[int], dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    layout = KVLayout(shape[0], shape[1], shape[2], dtype, shape[3])
    for cache in caches(layout):
        theirs = DynamicCache()
        for seed, tokens in enumerate(pieces):
            for layer in range(2):
                k, v = states(layout, tokens, 2 * seed + layer)
                ours, other = cache.update(k, v, layer), theirs.update(k, v, layer)
                assert torch.equal(ours[0], other[0]) and torch.equal(ours[1], other[1])
        assert cache.get_seq_length() == theirs.get_seq_length() == sum(pieces)
        cache.crop(-1)
        assert cache.get_seq_length() == sum(pieces) - 1


def test_int8_keeps_values_to_half_a_step() -> None:
    layout = KVLayout(3, 3, 32, torch.int8)
    for cache in caches(layout):
        k, v = states(layout, 50, 0)
        ours = cache.update(k, v, 0)
        for kept, given_ in zip(ours, (k, v), strict=True):
            step = given_.abs().amax(-1, keepdim=True) / 127
            assert bool(((kept - given_).abs() <= INT8_KV * step).all())
        assert layout.token_bytes == 2 * 3 * (32 + 4)


def test_layers_may_differ_in_heads_dtype_and_length() -> None:
    layouts = (KVLayout(1, 4, 8, torch.float32), KVLayout(4, 4, 8, torch.bfloat16), KVLayout(2, 2, 8, torch.int8))
    cache = growing_cache(layouts)
    for index, layout in enumerate(layouts):
        cache.update(*states(layout, 10 + index, index), index)
    assert [layer.length for layer in cache.layers] == [10, 11, 12]
    assert cache.stats().used_bytes == sum((10 + i) * layout.token_bytes for i, layout in enumerate(layouts))


@needs_reservations
def test_reading_is_no_copy_and_nothing_moves() -> None:
    cache = ReservationPool((LAYOUT,), 2000).cache()
    keys, _ = cache.update(*states(LAYOUT, 3, 0), 0)
    start = keys.data_ptr()
    for seed in range(200):
        keys, _ = cache.update(*states(LAYOUT, 5, seed), 0)
    assert keys.data_ptr() == start == cache.layers[0].storage.tensors["keys"].data_ptr()
    assert cache.stats().copied_bytes == 0
    grown = growing_cache((LAYOUT,))
    for seed in range(200):
        grown.update(*states(LAYOUT, 5, seed), 0)
    assert grown.stats().copied_bytes > 0


@needs_reservations
def test_reserving_costs_nothing_and_committed_bytes_are_resident() -> None:
    layout = KVLayout(8, 8, 64, torch.bfloat16)
    layers, context = 16, 32_768
    k, v = states(layout, 700, 0)
    ReservationPool((layout,), 1000).cache().update(k, v, 0)  # what writing itself needs
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    cache = ReservationPool((layout,) * layers, context).cache()
    reserved = process.memory_info().rss
    assert cache.stats().reserved_bytes >= layers * context * layout.token_bytes
    assert reserved - before < 2**20, "reserving must not cost memory"
    for index in range(layers):
        cache.update(k, v, index)
    time.sleep(0.2)  # what was asked for in the background
    grown, committed = process.memory_info().rss - reserved, cache.stats().committed_bytes
    assert committed >= 700 * layers * layout.token_bytes
    assert abs(grown - committed) <= (2 * layers) * PAGE_GROUP, f"{grown} resident, {committed} committed"
    assert cache.stats().waste_bytes <= 2 * 2 * layers * PAGE_GROUP


@needs_reservations
def test_pages_come_before_they_are_needed() -> None:
    layout = KVLayout(4, 4, 64, torch.float32)
    cache = ReservationPool((layout,), 8192).cache()
    k, v = states(layout, 1, 0)
    cache.update(k, v, 0)
    first = cache.stats().waited_pages
    for _ in range(1000):
        time.sleep(0.0005)
        cache.update(k, v, 0)
    assert cache.stats().waited_pages - first <= 2 * PAGE_GROUP // 4096, "steps waited for pages that the background thread had time for"
    assert cache.stats().committed_bytes >= cache.stats().used_bytes


@needs_reservations
def test_the_next_request_finds_the_pages_of_the_last_one() -> None:
    pool = ReservationPool((LAYOUT,) * 2, 4000)
    cache = pool.cache()
    for index in range(2):
        cache.update(*states(LAYOUT, 1000, 0), index)
    start = cache.layers[0].storage.tensors["keys"].data_ptr()
    del cache
    gc.collect()
    assert pool.committed_bytes() > 0
    again = pool.cache()
    assert again.get_seq_length() == 0 and again.layers[0].storage.tensors["keys"].data_ptr() == start
    again.update(*states(LAYOUT, 900, 1), 0)
    assert again.stats().waited_pages == 0
    k, _ = states(LAYOUT, 900, 1)
    assert torch.equal(again.layers[0]._read("keys"), k)


@needs_reservations
def test_pages_beyond_what_is_kept_are_given_back() -> None:
    pool = ReservationPool((KVLayout(8, 8, 64, torch.float32),), 8000, keep_bytes=0)
    cache = pool.cache()
    cache.update(*states(pool.layouts[0], 4000, 0), 0)
    before = psutil.Process().memory_info().rss
    time.sleep(0.1)
    del cache
    gc.collect()
    assert pool.committed_bytes() == 0
    assert before - psutil.Process().memory_info().rss > 8 * 2**20


@needs_reservations
def test_two_caches_at_once_do_not_share() -> None:
    pool = ReservationPool((LAYOUT,), 100)
    one, two = pool.cache(), pool.cache()
    one.update(*states(LAYOUT, 5, 1), 0)
    two.update(*states(LAYOUT, 5, 2), 0)
    assert torch.equal(one.layers[0]._read("keys"), states(LAYOUT, 5, 1)[0])


@needs_reservations
def test_reservations_are_returned_to_the_system() -> None:
    def mapped() -> int:
        return sum(1 for _ in Path("/proc/self/maps").open())

    gc.collect()
    before = mapped()
    for _ in range(20):
        storage = ReservedStorage(LAYOUT, 10_000)
        storage.ensure(10)
        del storage
    gc.collect()
    time.sleep(0.1)
    gc.collect()
    assert mapped() <= before + 8


def test_beyond_the_context_and_batches_are_refused_and_nothing_is_lost() -> None:
    cache = caches(LAYOUT, context=20)[-1]
    k, v = states(LAYOUT, 20, 0)
    cache.update(k, v, 0)
    if reservations_work():
        with pytest.raises(InvalidRequest, match="reserved for 20 tokens, and this text has 21"):
            cache.update(*states(LAYOUT, 1, 1), 0)
    assert cache.layers[0].length == 20 and torch.equal(cache.layers[0]._read("keys"), k)
    with pytest.raises(InvalidRequest, match="one text, not a batch of 2"):
        cache.update(k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1), 1)


@needs_reservations
def test_more_address_space_than_there_is_is_refused_with_the_numbers() -> None:
    with pytest.raises(OutOfMemory, match=r"GiB of address space for the KV cache cannot be reserved"):
        Region(2**62)


@needs_reservations
def test_memory_that_runs_out_while_committing_is_refused_and_the_rest_stays() -> None:
    code = """
import torch
from core.errors import OutOfMemory
from kernels.kv_memory.region import Region
region = Region(2**33)
region.commit_to(2**20)
tensor = region.tensor((2**18,), torch.float32)
tensor.fill_(7)
import kernels.kv_memory.region as module
real = module._LIBC.madvise
class Full:
    def __init__(self, inner): self.inner = inner
    def __getattr__(self, name): return getattr(self.inner, name)
    def madvise(self, *args):
        import ctypes, errno
        ctypes.set_errno(errno.ENOMEM)
        return -1
module._LIBC = Full(module._LIBC)
try:
    region.commit_to(2**22)
except OutOfMemory as error:
    assert '3.0 MiB more' in str(error), error
    assert region.committed == 2**20 and bool((tensor == 7).all())
    print('refused')
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(region.__file__).parent.parent.parent)
    assert "refused" in ran.stdout, ran.stdout + ran.stderr


@needs_reservations
def test_kernels_without_populate_touch_each_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region, "_POPULATE_WRITE", 9999)  # EINVAL, as before Linux 5.14
    place = Region(2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert place.commit_to(2**20) == 256
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before >= 256
    assert bool((place.tensor((2**20,), torch.uint8) == 0).all())
