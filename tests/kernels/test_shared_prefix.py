"""Pages that several texts share: the same content, each text's writes its own, in memory once, and freed by the last one."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import time
from pathlib import Path

import pytest
import torch

from core.memory import proportional_bytes
from kernels.kv_memory import reservation_pool, shared_prefix
from kernels.kv_memory.cache import TokenMajorCache, growing_cache
from kernels.kv_memory.layout import KVLayout
from kernels.kv_memory.region import PAGE_GROUP, reservations_work
from kernels.kv_memory.reservation_pool import ReservationPool
from kernels.kv_memory.shared_prefix import PrefixFile, sharing_works

pytestmark = pytest.mark.skipif(not reservations_work() or not sharing_works(), reason="NOT RUN: this system has no files in memory that can be sealed")

WIDE = KVLayout(8, 8, 64, torch.float32)  # 2 KiB a token and part: 32 tokens a page group
LAYOUTS = {
    "float32": (WIDE,) * 2,
    "bfloat16": (KVLayout(4, 4, 64, torch.bfloat16),) * 2,
    "int8 with scales": (KVLayout(4, 4, 64, torch.int8),) * 2,
    "fewer keys than values": (KVLayout(1, 8, 64, torch.float32), KVLayout(8, 8, 64, torch.float32)),
    "each layer another": (KVLayout(2, 4, 20, torch.float32, 12), KVLayout(4, 4, 64, torch.bfloat16), KVLayout(3, 3, 32, torch.int8)),
}


def states(layout: KVLayout, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float32 if layout.scaled else layout.dtype
    k = torch.randn(1, layout.k_heads, tokens, layout.head_dim, generator=generator).to(dtype)
    return k, torch.randn(1, layout.v_heads, tokens, layout.v_head_dim or layout.head_dim, generator=generator).to(dtype)


def write(cache: TokenMajorCache, tokens: int, seed: int) -> None:
    for index, layer in enumerate(cache.layers):
        layer.update(*states(layer.storage.layout, tokens, seed + index))


def content(cache: TokenMajorCache) -> list[torch.Tensor]:
    """Everything the cache holds, a copy: codes and scales as they are in memory."""
    return [tensor[: layer.length].clone() for layer in cache.layers for tensor in layer.storage.tensors.values()]


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def file_of(pool: ReservationPool) -> PrefixFile:
    assert pool.file is not None
    return pool.file


def settle() -> None:
    gc.collect()
    time.sleep(0.1)  # what was asked for in the background


@pytest.mark.parametrize("layouts", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("drop", [0, 1, 77, 300])
def test_fork_holds_the_same_and_each_goes_on_alone(layouts: tuple[KVLayout, ...], drop: int) -> None:
    for cache in (ReservationPool(layouts, 1000).cache(), growing_cache(layouts)):
        write(cache, 300, 0)
        before = content(cache)
        fork = cache.fork(drop)
        assert [layer.length for layer in fork.layers] == [300 - drop] * len(layouts)
        assert same(content(fork), [t[: 300 - drop] for t in before])
        write(fork, 50, 100)
        assert same(content(cache), before), "writing to the fork changed the original"
        forked = content(fork)
        write(cache, 60, 200)
        cache.crop(-200)
        write(cache, 100, 300)
        assert same(content(fork), forked), "writing to the original changed the fork"


def test_layers_of_different_lengths_are_forked_as_they_are() -> None:
    layouts = LAYOUTS["each layer another"]
    cache = ReservationPool(layouts, 1000).cache()
    for index, (layer, tokens) in enumerate(zip(cache.layers, (900, 40, 300), strict=True)):
        layer.update(*states(layer.storage.layout, tokens, index))
    fork = cache.fork(30)
    assert [layer.length for layer in fork.layers] == [870, 10, 270]
    assert same(content(fork), [t[: len(t) - 30] for t in content(cache)])


def test_whole_page_groups_are_shared_and_the_rest_is_copied() -> None:
    pool = ReservationPool(LAYOUTS["float32"], 1000)
    cache = pool.cache()
    write(cache, 100, 0)
    fork = cache.fork()
    parts = 2 * 2  # layers, keys and values
    shared, rest = parts * 3 * PAGE_GROUP, parts * 4 * 2048  # 3 groups of 32 tokens, and 4 tokens
    assert cache.stats().shared_bytes == fork.stats().shared_bytes == pool.shared_bytes() == shared
    assert fork.stats().copied_bytes == rest and fork.stats().committed_bytes == parts * PAGE_GROUP
    assert all(region.private_bytes >= 0 for layer in cache.layers for region in layer.storage.regions.values())  # type: ignore[attr-defined]
    many = KVLayout(4, 4, 64, torch.int8)
    small = ReservationPool((many,), 1000).cache()
    write(small, 300, 0)
    assert small.fork().stats().shared_bytes == 2 * PAGE_GROUP, "300 tokens of scales fill no page group"


def test_forks_of_a_fork_share_what_the_first_one_shared() -> None:
    pool = ReservationPool(LAYOUTS["float32"], 1000)
    cache = pool.cache()
    write(cache, 64, 0)
    forks = [cache.fork() for _ in range(3)]
    assert pool.shared_bytes() == 4 * 2 * PAGE_GROUP and file_of(pool).slots_in_use == 1
    write(forks[0], 64, 5)
    longer = forks[0].fork()
    assert file_of(pool).slots_in_use == 2, "the second slot holds only what the first does not"
    assert pool.shared_bytes() == 4 * 4 * PAGE_GROUP
    assert same(content(longer), content(forks[0]))
    assert same(content(cache), [t[:64] for t in content(longer)])


def test_a_second_text_with_the_same_beginning_is_in_memory_once() -> None:
    layouts = (KVLayout(8, 8, 64, torch.float32),) * 8
    pool = ReservationPool(layouts, 4000)
    tokens = 1024
    whole = sum(layout.token_bytes for layout in layouts) * tokens
    warm = ReservationPool(layouts, 1000).cache()
    write(warm, 64, 0)
    warm.fork()
    cache = pool.cache()
    write(cache, tokens, 0)
    settle()
    before = proportional_bytes()
    forks = [cache.fork() for _ in range(3)]
    settle()
    grown = proportional_bytes() - before
    committed = sum(fork.stats().committed_bytes for fork in forks)
    assert all(fork.stats().shared_bytes == whole == pool.shared_bytes() for fork in forks)
    assert abs(grown - committed) < whole // 8, f"{grown} bytes more for three forks of {whole} bytes, {committed} of them their own"
    assert grown < whole // 4
    for fork in forks:
        fork.crop(-tokens)
        write(fork, tokens, 1)
    settle()
    assert proportional_bytes() - before > 2.5 * whole, "this test would not see copies"


def test_pages_of_the_file_are_freed_with_the_last_user_and_the_slot_is_used_again() -> None:
    pool = ReservationPool(LAYOUTS["float32"], 1000, keep_bytes=0)
    cache = pool.cache()
    write(cache, 320, 0)
    fork, other = cache.fork(), cache.fork()
    held = file_of(pool).physical_bytes
    assert held == 4 * 10 * PAGE_GROUP
    kept = content(fork)
    del cache
    gc.collect()
    assert file_of(pool).physical_bytes == held and same(content(fork), kept), "freed while somebody used it"
    other.crop(-320)
    write(other, 1, 9)
    assert file_of(pool).physical_bytes == held
    del fork
    gc.collect()
    assert file_of(pool).physical_bytes == 0 and file_of(pool).slots_in_use == 0
    for _ in range(shared_prefix.SLOTS + 2):
        again = pool.cache()
        write(again, 64, 3)
        more = again.fork()
        assert same(content(again), content(more)) and file_of(pool).slots_in_use == 1
        del again, more


def test_without_a_free_slot_pages_are_copied() -> None:
    pool = ReservationPool(LAYOUTS["float32"], 200)
    caches = []
    for seed in range(shared_prefix.SLOTS + 1):
        cache = pool.cache()
        write(cache, 64, seed)
        caches.append((cache, cache.fork()))
    assert [fork.stats().shared_bytes > 0 for _, fork in caches] == [True] * shared_prefix.SLOTS + [False]
    assert all(same(content(cache), content(fork)) for cache, fork in caches)


def test_no_memory_for_the_file_leaves_the_text_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ReservationPool(LAYOUTS["float32"], 200)
    cache = pool.cache()
    write(cache, 100, 0)
    before, real, calls = content(cache), os.pwrite, []

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data[: PAGE_GROUP // 2], offset)  # and half of what is asked for, as write may do

    monkeypatch.setattr(shared_prefix.os, "pwrite", full)
    fork = cache.fork()
    gc.collect()
    assert len(calls) == 3 and pool.shared_bytes() == 0 and file_of(pool).slots_in_use == 0
    assert same(content(cache), before) and same(content(fork), before)


def test_without_such_files_everything_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservation_pool, "prefix_file", lambda sizes: None)
    pool = ReservationPool(LAYOUTS["float32"], 200)
    cache = pool.cache()
    write(cache, 100, 0)
    fork = cache.fork()
    assert same(content(fork), content(cache)) and fork.stats().shared_bytes == 0 == pool.shared_bytes()


def test_the_file_can_neither_shrink_nor_grow_nor_be_unsealed() -> None:
    file = PrefixFile((PAGE_GROUP, PAGE_GROUP))
    size = os.fstat(file.descriptor).st_size
    for other in (0, size - PAGE_GROUP, size + PAGE_GROUP):
        with pytest.raises(PermissionError):
            os.ftruncate(file.descriptor, other)
    with pytest.raises(PermissionError):
        os.pwrite(file.descriptor, b"x", size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(file.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert os.fstat(file.descriptor).st_size == size and not os.get_inheritable(file.descriptor)


def test_every_mapping_of_the_file_is_private() -> None:
    pool = ReservationPool(LAYOUTS["float32"], 200)
    cache = pool.cache()
    write(cache, 100, 0)
    fork = cache.fork()
    modes = {line.split()[1] for line in Path("/proc/self/maps").read_text().splitlines() if "fusebox-kv" in line}
    assert modes == {"rw-p"}, "a shared mapping would let one text write into another"
    assert fork.length == 100


def test_a_file_lives_no_longer_than_its_pool() -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    gc.collect()
    before = open_files()
    for _ in range(5):
        pool = ReservationPool(LAYOUTS["float32"], 200)
        cache = pool.cache()
        write(cache, 64, 0)
        assert cache.fork().stats().shared_bytes > 0
        del pool, cache
    settle()
    assert open_files() <= before + 1  # that of the listing itself


def test_writing_into_shared_pages_is_counted_as_memory_of_its_own() -> None:
    pool = ReservationPool(LAYOUTS["float32"], 1000)
    cache = pool.cache()
    write(cache, 320, 0)
    fork = cache.fork()
    own, shared = fork.stats().committed_bytes, fork.stats().shared_bytes
    fork.crop(-300)  # 20 tokens stay: the first page group is written to from its middle on
    waited = fork.stats().waited_pages
    write(fork, 1, 9)
    stats = fork.stats()
    assert stats.shared_bytes == 0 and stats.committed_bytes == own + shared and stats.waited_pages - waited == shared // 4096
    assert same([t[:20] for t in content(fork)], [t[:20] for t in content(cache)])
    assert cache.stats().shared_bytes == shared
