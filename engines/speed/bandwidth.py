"""How fast this machine reads memory."""

from __future__ import annotations

import time

import torch

from kernels.huge_pages import in_huge_pages

_BYTES = 2 * 2**30


def read_bandwidth(rounds: int = 5) -> float:
    """Bytes a second, the best of some sums over 2 GiB in huge pages by all of torch's threads."""
    buffer = in_huge_pages(torch.ones(_BYTES // 4))
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - began)
    return _BYTES / best
