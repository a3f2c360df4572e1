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
NF4_UNPACKED = Tolerance(2e-4, 1e-4, "same codes and fp32 scales, fp32 product of up to 256 terms against float64: order of sums only")
BF16_AUTOCAST = Tolerance(3e-2, 2e-2, "products under bf16 autocast keep 8 bits")
ROTATED_LOGITS = Tolerance(1e-3, 0.0, "fp32 weights written in another basis; the bound that the technique promises")
ROTATED_64 = Tolerance(1e-5, 0.0, "float64 in another order, but for the final norm, which transformers rounds to float32; Top-K chooses the same entries")
PUBLISHED_NLL = Tolerance(2e-6, 0.0, "expected.json prints six decimals; 38,168 fp32 logs are summed")
PRINTED_3 = Tolerance(6e-4, 0.0, "published values are printed with three decimals")

ROTATED = {torch.float32: 1e-4, torch.bfloat16: 0.25}
"""Largest move of a logit as a share of the logits' spread when weights are written in another basis: rounding of weights and residuals
to 24 and 8 bits. fp32 moves 1e-5 of it; in the tiny random models, whose logits are sums of large terms, bf16 moves up to a tenth."""

ROUNDED_ONCE = {("cuda", torch.float16): 2**-11, ("cuda", torch.bfloat16): 2**-8, ("cpu", torch.float16): 2**-11, ("cpu", torch.bfloat16): 2**-7}
"""Relative distance of a sum that is rounded to 11 or 8 bits once: half a unit in the last place, and a whole one for bfloat16 in Triton's
interpreter ("cpu"), which cuts off where a device rounds. float32's own sums: see SUM_ORDER."""

NATIVE = Tolerance(1e-3, 0.0, "fp32 sums in C against torch's; the bound that the runtime promises. Seen: 3e-5")
PEER_F16 = Tolerance(6e-2, 1e-2, "llama.cpp keeps weights and cache in fp16, 11 bits, and flash attention sums values in it; tiny models with random weights. Seen: 1.4e-2, 2.3e-2 with flash attention")
PEER_INT8_COSINE = 0.99
"""Least cosine of a rival's logits with torch's where its weights have 8 bits. Seen: 0.999; a wrong order of rotary pairs gives less than 0.9."""
BF16_OUTPUT = Tolerance(2e-5, 2.0**-7, "one bfloat16 step: fp32 sums in another order may round to the neighbour")
BF16_WEIGHTS = Tolerance(2e-2, 2.0**-7, "weights or outputs rounded to 8 bits before they are summed or scaled: 2e-3 of terms whose sum's spread is 1")
INT8_KV = 0.5 + 1e-3
"""Furthest a cached entry may lie from what was written, in steps of its scale: half a step and the last bits of fp32."""
NATIVE_BF16 = 0.1
"""Largest distance of a logit from fp32's, as a share of the logits' spread, with bf16 weights read in C: only the prompt was read in bf16."""

INT8_NORM = 1e-3
"""Relative norm of the difference: fp16 weights often lie exactly half-way between two codes, and one code is 1/127 of a row's range.
bitsandbytes also writes 1/127**2 as 6.200124e-05, 2e-5 off. int8 itself costs 8e-3."""

INT8_CODE = 0.5 + 1e-4
"""Furthest a code may lie from the exact quotient: half a step, and the last bits of fp32."""

NF4_FUSED_NORM = 6e-3
"""Relative norm of the difference: the fused CPU kernel takes inputs, values and scales as bf16 (8 bits, 2e-3 each). nf4 itself costs 9e-2."""

LOSSY_FLOOR = 1e-4
"""A lossy technique must move some logit by more than this share of the logits' spread: sums in another order move 1e-6 of it."""
