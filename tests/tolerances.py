"""Every tolerance of the tests with its reason. Where none is named, equality is bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """`|a - b| <= atol + rtol * |b|`, and why not zero."""

    atol: float
    rtol: float
    why: str

    def holds(self, a: Tensor, b: Tensor) -> bool:
        """True when `a` is close enough to the reference `b`."""
        return torch.allclose(a.double(), b.double(), atol=self.atol, rtol=self.rtol)


SUM_ORDER = Tolerance(2e-5, 1e-5, "fp32 sums taken in another order: one row at a time against a whole sequence, chunks against all rows, weights at another alignment")
NUMPY_LINEAR = Tolerance(2e-4, 1e-4, "an fp32 product of up to 256 terms against numpy in float64")
INT8_OUTPUT = Tolerance(5e-3, 2e-3, "bitsandbytes passes inputs through fp16 (11 bits) before rounding: a value at a rounding edge may fall to the other code")
NF4_FUSED = Tolerance(3e-2, 2e-2, "the fused CPU kernel multiplies in bf16 (8 bits) and keeps the scales in bf16")
NF4_UNPACKED = Tolerance(2e-4, 1e-4, "same codes and fp32 scales, fp32 product: order of sums only")
BF16_AUTOCAST = Tolerance(3e-2, 2e-2, "products under bf16 autocast keep 8 bits")
PUBLISHED_NLL = Tolerance(2e-6, 0.0, "expected.json prints six decimals; 38,168 fp32 logs are summed")
PRINTED_3 = Tolerance(6e-4, 0.0, "published values are printed with three decimals")

LOSSY_FLOOR = 1e-4
"""A lossy technique must move some logit by more than this share of the logits' spread: sums in another order move 1e-6 of it."""
