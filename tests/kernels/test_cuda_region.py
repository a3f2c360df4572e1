"""Device memory by the driver's calls, against a driver that keeps books and refuses what the real one would."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import MissingDependency, OutOfMemory
from kernels.kv_memory import storage
from kernels.kv_memory.cuda_region import Access, Allocation, CudaRegion, Driver, cuda_driver
from kernels.kv_memory.layout import KVLayout
from kernels.kv_memory.reservation_pool import ReservationPool

GROUP = 2 * 2**20
CALLS = ("cuMemGetAllocationGranularity", "cuMemAddressReserve", "cuMemAddressFree", "cuMemCreate", "cuMemRelease", "cuMemMap", "cuMemUnmap", "cuMemSetAccess")


class Library:
    """libcuda's eight calls over books: reservations, handles, mappings. An order or a size that CUDA refuses is CUDA_ERROR_INVALID_VALUE."""

    def __init__(self, memory: int = 2**40) -> None:
        self.memory, self.calls, self.next = memory, [], 0x7000_0000_0000
        self.reserved: dict[int, int] = {}
        self.created: dict[int, int] = {}
        self.mapped: dict[int, tuple[int, int]] = {}
        self.allowed: set[int] = set()
        self.fail: tuple[str, int, int] | None = None
        """(call, which one of them counted from 1, code)."""

    def __getattr__(self, name: str) -> Any:
        if name not in CALLS:
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if self.fail and self.fail[:2] == (name, self.calls.count(name)):
                return self.fail[2]
            return getattr(self, f"_{name}")(*arguments)

        return call

    def cuGetErrorName(self, code: ctypes.c_int, text: Any) -> int:
        names = {1: b"CUDA_ERROR_INVALID_VALUE", 2: b"CUDA_ERROR_OUT_OF_MEMORY"}
        text._obj.value = names.get(code.value)
        return 0 if code.value in names else 1

    def _cuMemGetAllocationGranularity(self, out: Any, prop: Any, option: ctypes.c_int) -> int:
        assert isinstance(prop._obj, Allocation) and prop._obj.type == 1 and prop._obj.location.type == 1 and option.value == 0
        out._obj.value = GROUP
        return 0

    def _cuMemAddressReserve(self, out: Any, size: Any, alignment: Any, address: Any, flags: Any) -> int:
        if size.value % GROUP or not size.value:
            return 1
        if size.value > 2**47:
            return 2
        out._obj.value, self.next = self.next, self.next + size.value
        self.reserved[out._obj.value] = size.value
        return 0

    def _cuMemAddressFree(self, address: Any, size: Any) -> int:
        used = any(address.value <= place < address.value + size.value for place in self.mapped)
        return 1 if used or self.reserved.get(address.value) != size.value or not self.reserved.pop(address.value) else 0

    def _cuMemCreate(self, out: Any, size: Any, prop: Any, flags: Any) -> int:
        if size.value % GROUP or prop._obj.location.id != 3:
            return 1
        if sum(self.created.values()) + size.value > self.memory:
            return 2
        out._obj.value = len(self.calls) + 1000
        self.created[out._obj.value] = size.value
        return 0

    def _cuMemRelease(self, handle: Any) -> int:
        return 1 if self.created.pop(handle.value, None) is None or handle.value in {h for _, h in self.mapped.values()} else 0

    def _cuMemMap(self, address: Any, size: Any, offset: Any, handle: Any, flags: Any) -> int:
        home = any(start <= address.value and address.value + size.value <= start + length for start, length in self.reserved.items())
        if not home or address.value in self.mapped or self.created.get(handle.value) != size.value or offset.value or flags.value:
            return 1
        self.mapped[address.value] = (size.value, handle.value)
        return 0

    def _cuMemUnmap(self, address: Any, size: Any) -> int:
        self.allowed.discard(address.value)
        return 1 if self.mapped.pop(address.value, (0, 0))[0] != size.value else 0

    def _cuMemSetAccess(self, address: Any, size: Any, access: Any, count: Any) -> int:
        if self.mapped.get(address.value, (0, 0))[0] != size.value or count.value != 1 or not isinstance(access._obj, Access):
            return 1
        if access._obj.flags == 3 and access._obj.location.id == 3:
            self.allowed.add(address.value)
        return 0

    def holds_nothing(self) -> bool:
        return not (self.created or self.mapped or self.allowed)


class FakeDriver(Driver):
    """The real driver class, but for waiting for a device."""

    waits = 0

    def synchronise(self) -> None:
        self.waits += 1


def made(groups: int, memory: int = 2**40) -> tuple[CudaRegion, Library, FakeDriver]:
    library = Library(memory)
    driver = FakeDriver(library, 3)
    return CudaRegion(groups * GROUP - 1, driver), library, driver


def check(region: CudaRegion, library: Library, groups: int) -> None:
    places = {region.base + i * GROUP for i in range(groups)}
    assert region.committed == groups * GROUP
    assert set(library.mapped) == library.allowed == places and len(library.created) == groups


def test_reserving_takes_no_memory_and_pages_come_whole() -> None:
    region, library, _ = made(4)
    assert region.size == 4 * GROUP and region.page_group == GROUP and library.reserved == {region.base: 4 * GROUP}
    check(region, library, 0)
    assert region.commit_to(1) == 1 and region.commit_to(GROUP) == 0 and region.commit_to(GROUP + 1) == 1
    check(region, library, 2)
    assert library.calls[-3:] == ["cuMemCreate", "cuMemMap", "cuMemSetAccess"]
    assert region.commit_to(10**12) == 2
    check(region, library, 4)


def test_release_waits_for_the_device_and_unmaps_before_it_releases() -> None:
    region, library, driver = made(4)
    region.commit_to(4 * GROUP)
    library.calls.clear()
    region.release_from(GROUP + 1)
    assert driver.waits == 1 and library.calls == ["cuMemUnmap", "cuMemRelease"] * 2
    check(region, library, 2)
    region.release_from(3 * GROUP)
    assert driver.waits == 1, "nothing to give back, nothing to wait for"
    region.release_from(0)
    assert library.holds_nothing()


@settings(max_examples=80)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7 * GROUP)), max_size=12), st.integers(1, 6))
def test_books_are_right_after_any_calls_and_closed_at_the_end(calls: list[tuple[bool, int]], groups: int) -> None:
    region, library, _ = made(groups)
    for commit, size in calls:
        before, whole = region.committed, min(-(-size // GROUP), groups)
        if commit:
            assert region.commit_to(size) == max(0, whole - before // GROUP)
        else:
            region.release_from(size)
        check(region, library, max(whole, before // GROUP) if commit else min(whole, before // GROUP))
    del region
    assert library.holds_nothing() and not library.reserved


@pytest.mark.parametrize("call", ["cuMemCreate", "cuMemMap", "cuMemSetAccess"])
@pytest.mark.parametrize("place", [2, 3, 4])
def test_a_failure_half_way_leaves_what_was_there_before(call: str, place: int) -> None:
    region, library, _ = made(5)
    region.commit_to(GROUP)
    library.fail = (call, place, 2)
    with pytest.raises(OutOfMemory, match=r"needs 6\.0 MiB more on device 3 beyond 2\.0 MiB.*" + call + ": CUDA_ERROR_OUT_OF_MEMORY"):
        region.commit_to(4 * GROUP)
    check(region, library, 1)
    library.fail = None
    assert region.commit_to(4 * GROUP) == 3
    check(region, library, 4)


def test_a_full_device_is_refused_and_the_rest_stays() -> None:
    region, library, _ = made(8, memory=3 * GROUP)
    region.commit_to(2 * GROUP)
    with pytest.raises(OutOfMemory, match=r"4\.0 MiB more"):
        region.commit_to(4 * GROUP)
    check(region, library, 2)


def test_a_refused_reservation_says_how_much_and_unknown_codes_their_number() -> None:
    with pytest.raises(OutOfMemory, match=r"GiB of device address space .*cuMemAddressReserve: CUDA_ERROR_OUT_OF_MEMORY"):
        CudaRegion(2**50, FakeDriver(Library(), 3))
    region, library, _ = made(2)
    library.fail = ("cuMemCreate", 1, 999)
    with pytest.raises(OutOfMemory, match="CUDA error 999"):
        region.commit_to(1)


def test_a_driver_that_fails_at_the_end_is_logged_not_raised(caplog: pytest.LogCaptureFixture) -> None:
    region, library, _ = made(2)
    region.commit_to(1)
    library.fail = ("cuMemUnmap", 1, 4)
    del region
    assert "not given back" in caplog.text


def test_structures_lie_as_the_driver_header_says() -> None:
    assert (ctypes.sizeof(Allocation), Allocation.location.offset, Allocation.win32.offset, Allocation.flags.offset) == (32, 8, 16, 24)
    assert (ctypes.sizeof(Access), Access.flags.offset) == (12, 8)


@pytest.mark.parametrize(("dtype", "code"), [(torch.float32, "<f4"), (torch.float16, "<f2"), (torch.bfloat16, "<i2"), (torch.int8, "|i1")])
def test_the_tensor_is_asked_for_at_the_address_and_keeps_the_region(dtype: torch.dtype, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    region, library, _ = made(2)
    seen: list[Any] = []
    plain = {"<f4": torch.float32, "<f2": torch.float16, "<i2": torch.int16, "|i1": torch.int8}

    def as_tensor(view: Any, device: str) -> torch.Tensor:
        seen.extend([view, device])
        check(region, library, 1)  # torch can find the device of a mapped address only
        return torch.zeros(view.__cuda_array_interface__["shape"], dtype=plain[view.__cuda_array_interface__["typestr"]])

    monkeypatch.setattr("kernels.kv_memory.cuda_region.torch.as_tensor", as_tensor)
    tensor = region.tensor((10, 2, 8), dtype)
    assert tensor.dtype == dtype and tensor.shape == (10, 2, 8)
    assert seen[0].__cuda_array_interface__ == {"shape": (10, 2, 8), "typestr": code, "data": (region.base, False), "version": 2, "strides": None}
    assert seen[0].region is region and seen[1] == "cuda:3"


@pytest.mark.skipif(torch.cuda.is_available(), reason="NOT RUN: this machine has a CUDA device")
def test_without_a_device_there_is_no_driver() -> None:
    assert cuda_driver(torch.device("cpu")) is None and cuda_driver(torch.device("cuda")) is None


def test_storage_of_a_cuda_device_is_backed_by_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    library, ahead = Library(), []
    monkeypatch.setattr(storage, "cuda_driver", lambda device: FakeDriver(library, device.index))
    monkeypatch.setattr(storage.COMMITTER, "commit_soon", lambda region, size: ahead.append((region, size)))
    monkeypatch.setattr(CudaRegion, "tensor", lambda region, shape, dtype: torch.zeros(0, dtype=dtype))
    made_ = storage.ReservedStorage(KVLayout(8, 8, 128, torch.bfloat16), 8192, torch.device("cuda", 3))  # 1,024 tokens in a page group
    assert len(library.reserved) == 2 and made_.reserved_bytes == 2 * 8 * GROUP and made_.committed_bytes == 0
    assert made_.ensure(1025) == 2048 and made_.committed_bytes == 4 * GROUP and made_.waited_pages == 4
    assert [size - 1025 * 2048 for _, size in ahead] == [GROUP, GROUP], "the next group is asked for in the background"
    made_.release_from(0)
    assert library.holds_nothing()


def test_texts_in_device_memory_are_forked_by_copying(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setattr(storage, "cuda_driver", lambda device: FakeDriver(library, device.index))
    monkeypatch.setattr(storage.COMMITTER, "commit_soon", lambda region, size: region.commit_to(size, ahead=True))
    monkeypatch.setattr(CudaRegion, "tensor", lambda region, shape, dtype: torch.zeros(*shape, dtype=dtype))
    layout = KVLayout(8, 8, 128, torch.bfloat16)
    pool = ReservationPool((layout,), 4096, device=torch.device("cuda", 3))
    cache = pool.cache()
    cache.update(*(torch.randn(1, 8, 1500, 128, dtype=torch.bfloat16) for _ in range(2)), 0)
    fork = cache.fork(100)
    for name, tensor in cache.layers[0].storage.tensors.items():
        assert torch.equal(fork.layers[0].storage.tensors[name][:1400], tensor[:1400])
    stats = fork.stats()
    assert stats.copied_bytes == 1400 * layout.token_bytes and stats.shared_bytes == 0 == pool.shared_bytes() and stats.committed_bytes == 2 * 2 * GROUP
    assert cache.stats().ahead_pages == 2 and cache.stats().used_pages == 4, "a page of a device is its page group"


@pytest.mark.skipif(torch.cuda.is_available(), reason="NOT RUN: this machine has a CUDA device")
def test_storage_of_a_device_without_a_driver_is_refused() -> None:
    with pytest.raises(MissingDependency, match="libcuda"):
        storage.make_region(1, torch.device("cuda", 0))
