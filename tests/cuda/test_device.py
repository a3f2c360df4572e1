"""What only a CUDA device shows; a few seconds. The kernels' own tests run on the device too where there is one."""

from __future__ import annotations

import pytest
import torch

from core.errors import OutOfMemory
from kernels.kv_memory.layout import KVLayout
from kernels.kv_memory.reservation_pool import ReservationPool
from kernels.kv_memory.storage import make_region

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: no CUDA device")]


def test_pages_are_committed_read_and_given_back() -> None:
    device = torch.device("cuda", 0)
    torch.zeros(1, device=device)
    region = make_region(2**40, device)
    tensor = region.tensor((2**34,), torch.float32)
    region.commit_to(4 * region.page_group)
    entries = region.committed // 4
    tensor[:entries] = torch.arange(entries, device=device, dtype=torch.float32)
    assert float(tensor[entries - 1]) == entries - 1 and tensor.data_ptr() == region.base
    free = torch.cuda.mem_get_info(device)[0]
    region.commit_to(2**30)
    held = free - torch.cuda.mem_get_info(device)[0]
    assert 0.9 * 2**30 < held < 1.1 * 2**30
    region.release_from(0)
    assert torch.cuda.mem_get_info(device)[0] - free >= 0
    with pytest.raises(OutOfMemory, match="more on device 0"):
        region.commit_to(torch.cuda.get_device_properties(device).total_memory + 2**30)
    assert region.committed == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cache_on_the_device_keeps_what_is_written(dtype: torch.dtype) -> None:
    cache = ReservationPool((KVLayout(4, 4, 64, dtype),) * 2, 32_768, device=torch.device("cuda", 0)).cache()
    pieces = [torch.randn(1, 4, tokens, 64, device="cuda").to(dtype) for tokens in (700, 1, 1, 5000)]
    for piece in pieces:  # the committing thread's pages are written to as well
        keys, values = cache.update(piece, -piece, 0)
    assert torch.equal(keys, torch.cat(pieces, 2)) and torch.equal(values, -torch.cat(pieces, 2))
