"""A `Region` of device memory: address space reserved by the CUDA driver, backed by pages as they are needed."""

from __future__ import annotations

import ctypes
import logging
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from core.errors import OutOfMemory
from core.units import format_bytes
from kernels.kv_memory.region import SharedPart

log = logging.getLogger(__name__)

_PINNED, _ON_DEVICE, _READ_WRITE, _MINIMUM = 1, 1, 3, 0  # CU_MEM_ALLOCATION_TYPE_, CU_MEM_LOCATION_TYPE_, CU_MEM_ACCESS_FLAGS_PROT_, ..._GRANULARITY_
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_CODES = {torch.float32: "<f4", torch.float16: "<f2", torch.int8: "|i1", torch.uint8: "|u1"}


class Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Flags(ctypes.Structure):
    _fields_ = (("compression", ctypes.c_ubyte), ("rdma", ctypes.c_ubyte), ("usage", ctypes.c_ushort), ("reserved", ctypes.c_ubyte * 4))


class Allocation(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (("type", ctypes.c_int), ("handles", ctypes.c_int), ("location", Location), ("win32", ctypes.c_void_p), ("flags", _Flags))


class Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", Location), ("flags", ctypes.c_int))


class DriverError(Exception):
    """A call of the driver failed; `code` is its CUresult."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call}: {name}")
        self.code = code


class Driver:
    """The driver's virtual memory calls on one device; addresses, handles and sizes are ints. Raises DriverError."""

    def __init__(self, library: Any, device: int) -> None:
        self._library, self.device = library, device
        self._property = Allocation(_PINNED, 0, Location(_ON_DEVICE, device), None, _Flags())

    def _call(self, name: str, *arguments: Any) -> None:
        code = int(getattr(self._library, name)(*arguments))
        if code:
            text = ctypes.c_char_p()
            known = self._library.cuGetErrorName(ctypes.c_int(code), ctypes.byref(text)) == 0 and text.value
            raise DriverError(name, code, text.value.decode() if known and text.value else f"CUDA error {code}")

    def granularity(self) -> int:
        """Bytes that pages come in."""
        size = ctypes.c_size_t()
        self._call("cuMemGetAllocationGranularity", ctypes.byref(size), ctypes.byref(self._property), ctypes.c_int(_MINIMUM))
        return size.value

    def reserve(self, size: int) -> int:
        """Address space; the address."""
        address = ctypes.c_uint64()
        self._call("cuMemAddressReserve", ctypes.byref(address), ctypes.c_size_t(size), ctypes.c_size_t(0), ctypes.c_uint64(0), ctypes.c_uint64(0))
        return address.value

    def free(self, address: int, size: int) -> None:
        """Give address space back; nothing may be mapped in it."""
        self._call("cuMemAddressFree", ctypes.c_uint64(address), ctypes.c_size_t(size))

    def create(self, size: int) -> int:
        """Physical memory; its handle."""
        handle = ctypes.c_uint64()
        self._call("cuMemCreate", ctypes.byref(handle), ctypes.c_size_t(size), ctypes.byref(self._property), ctypes.c_uint64(0))
        return handle.value

    def release(self, handle: int) -> None:
        """Give physical memory back once it is not mapped."""
        self._call("cuMemRelease", ctypes.c_uint64(handle))

    def map(self, address: int, size: int, handle: int) -> None:
        """Put physical memory at an address."""
        self._call("cuMemMap", ctypes.c_uint64(address), ctypes.c_size_t(size), ctypes.c_size_t(0), ctypes.c_uint64(handle), ctypes.c_uint64(0))

    def unmap(self, address: int, size: int) -> None:
        """Take physical memory away from an address."""
        self._call("cuMemUnmap", ctypes.c_uint64(address), ctypes.c_size_t(size))

    def allow(self, address: int, size: int) -> None:
        """Let kernels of this device read and write what is mapped."""
        access = Access(Location(_ON_DEVICE, self.device), _READ_WRITE)
        self._call("cuMemSetAccess", ctypes.c_uint64(address), ctypes.c_size_t(size), ctypes.byref(access), ctypes.c_size_t(1))

    def synchronise(self) -> None:
        """Wait for the device: no kernel may still use pages that are taken away."""
        torch.cuda.synchronize(self.device)


def cuda_driver(device: torch.device) -> Driver | None:
    """The driver of a CUDA device; None where there is none."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    torch.cuda.init()  # the calls need the device's context
    torch.empty(1, device=device)
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        log.warning("no virtual memory of the device: %s", error)
        return None
    return Driver(library, torch.cuda.current_device() if device.index is None else device.index)


class CudaRegion:
    """The interface of `Region`, in device memory; a page group is the driver's granularity, 2 MiB on today's devices.

    Source: vAttention (arXiv 2405.04437), section 5: the driver's calls without changes to the driver, hence large pages.

    Raises:
        OutOfMemory: the reservation is refused.
    """

    parts: tuple[SharedPart, ...] = ()
    shared = 0  # pages of a device are not shared between texts

    def __init__(self, size: int, driver: Driver) -> None:
        self._driver, self.page_group = driver, driver.granularity()
        self.page_bytes, self.ahead_pages = self.page_group, 0
        self.size = self._whole(size)
        self._lock = threading.Lock()
        self._handles: list[int] = []
        """Of the page groups committed, first to last."""
        try:
            self.base = driver.reserve(self.size)
        except DriverError as error:
            raise OutOfMemory(f"{format_bytes(self.size)} of device address space for the KV cache cannot be reserved ({error}). Use a shorter context.") from error
        weakref.finalize(self, _close, driver, self.base, self.size, self.page_group, self._handles)

    @property
    def committed(self) -> int:
        """Bytes that cost device memory."""
        return len(self._handles) * self.page_group

    private_bytes = committed

    def own_from(self, size: int) -> int:
        """See Region: every page is its own."""
        return 0

    def take_shared(self, parts: tuple[SharedPart, ...]) -> int:
        """See Region: there are none."""
        assert not parts
        return 0

    def _whole(self, size: int) -> int:
        return -(-size // self.page_group) * self.page_group

    def commit_to(self, size: int, *, ahead: bool = False) -> int:
        """Commit whole page groups up to `size` bytes; returns the page groups newly committed.

        Raises:
            OutOfMemory: the device has no memory left; what was committed before stays usable, nothing more is held.
        """
        with self._lock:
            before, wanted = len(self._handles), min(self._whole(size), self.size)
            try:
                while self.committed < wanted:
                    self._commit_one()
            except DriverError as error:
                missing = wanted - before * self.page_group
                _take_away(self._driver, self.base, self.page_group, self._handles, before)
                raise OutOfMemory(
                    f"The KV cache needs {format_bytes(missing)} more on device {self._driver.device} beyond {format_bytes(self.committed)}, and the driver refuses ({error}). "
                    "Start a new chat or use a shorter context."
                ) from error
            self.ahead_pages += len(self._handles) - before if ahead else 0
            return len(self._handles) - before

    def _commit_one(self) -> None:
        driver, address = self._driver, self.base + self.committed
        handle = driver.create(self.page_group)
        try:
            driver.map(address, self.page_group, handle)
        except DriverError:
            driver.release(handle)
            raise
        self._handles.append(handle)  # from here on it is taken away with the others
        driver.allow(address, self.page_group)

    def release_from(self, size: int) -> None:
        """Give back whole page groups beyond `size` bytes; their content is lost."""
        with self._lock:
            kept = min(self._whole(size) // self.page_group, len(self._handles))
            if kept < len(self._handles):
                self._driver.synchronise()
                _take_away(self._driver, self.base, self.page_group, self._handles, kept)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The region as a tensor on the device, without a copy; it keeps the region alive. Only committed parts may be touched.

        Commits the first page group: torch asks the driver which device an address belongs to, and it knows that of mapped ones only.
        """
        self.commit_to(1)
        stand_in = torch.int16 if dtype == torch.bfloat16 else dtype  # the protocol has no bfloat16
        view = torch.as_tensor(_Exported(self, shape, "<i2" if dtype == torch.bfloat16 else _CODES[stand_in]), device=f"cuda:{self._driver.device}")
        return view.view(dtype)


class _Exported:
    """What torch asks for an address; torch keeps this object, and so the region, as long as the tensor's storage lives."""

    def __init__(self, region: CudaRegion, shape: tuple[int, ...], code: str) -> None:
        self.region = region
        self.__cuda_array_interface__ = {"shape": shape, "typestr": code, "data": (region.base, False), "version": 2, "strides": None}


def _take_away(driver: Driver, base: int, page_group: int, handles: list[int], kept: int) -> None:
    while len(handles) > kept:
        handle = handles.pop()
        driver.unmap(base + len(handles) * page_group, page_group)
        driver.release(handle)


def _close(driver: Driver, base: int, size: int, page_group: int, handles: list[int]) -> None:
    try:
        driver.synchronise()
        _take_away(driver, base, page_group, handles, 0)
        driver.free(base, size)
    except (DriverError, RuntimeError) as error:  # at the end of the process the context may be gone first
        log.warning("device memory of the KV cache was not given back: %s", error)
