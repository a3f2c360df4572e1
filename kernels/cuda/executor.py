"""Who computes products that leave input channels out: Triton on CUDA, or nobody, and then why."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # needs Triton
    from kernels.cuda.selection import Selection

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SparseExecutor:
    """The functions of `kernels.cuda.selection` and `kernels.cuda.sparse_gemv`, and the dtypes that they read."""

    largest: Callable[[Tensor, int], Selection]
    above: Callable[[Tensor, float], Selection]
    nonzero: Callable[[Tensor], Selection]
    product: Callable[[Tensor, Selection, Tensor | None], Tensor]
    dtypes: tuple[torch.dtype, ...]


@dataclass(frozen=True)
class NoExecutor:
    """Zeros are multiplied; the reason for people, or None where nobody would expect an executor."""

    reason: str | None


def sparse_executor(device_type: str, device: torch.device) -> SparseExecutor | NoExecutor:
    """The executor for models on this kind of device; never raises.

    Args:
        device_type: what the model runs on, cuda or another.
        device: where one small product is tried: Triton can be installed and yet find no compiler or no driver.
    """
    if device_type != "cuda":
        return NoExecutor(None)
    try:
        from kernels.cuda import selection, sparse_gemv
    except ImportError as error:
        return NoExecutor(f"Triton is not installed ({error}); pip install triton")
    found = SparseExecutor(selection.largest, selection.above, selection.nonzero, sparse_gemv.sparse_gemv, sparse_gemv.DTYPES)
    try:
        _try(found, device)
    except Exception as error:  # Triton's compiler and driver raise whatever they like
        log.warning("no Triton kernels: %s", error, exc_info=True)
        return NoExecutor(f"Triton does not work here ({type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else 'no message'})")
    return found


def _try(executor: SparseExecutor, device: torch.device) -> None:
    x = torch.tensor([0.5, -2.0, 0.0], device=device)
    for selection in (executor.largest(x, 1), executor.above(x, 1.0), executor.nonzero(x * (x < 0))):
        got = executor.product(torch.tensor([[1.0], [3.0], [torch.nan]], device=device), selection, None)
        if got.tolist() != [-6.0]:
            raise RuntimeError(f"a product of -2 and 3 came out as {got.tolist()}")
