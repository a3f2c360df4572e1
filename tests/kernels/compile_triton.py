"""Compiles every Triton kernel for a CUDA device that need not be here: `python -m tests.kernels.compile_triton 90`."""

from __future__ import annotations

import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from kernels.cuda.selection import _BITS, TICKETS, _above, _largest, _warps
from kernels.cuda.sparse_gemv import _BLOCK_OUT, _BLOCK_ROWS, _WARPS, DTYPES, _product

_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32", "int16": "i16"}


def main(capability: int) -> None:
    for dtype in DTYPES[::2]:  # float16 goes the way of bfloat16
        kind, bits = _BITS[dtype]
        vector, integers = "*" + _NAMES[str(dtype)[6:]], "*" + _NAMES[str(kind)[6:]]
        selected = {"kept": vector, "rows": "*i32", "count": "*i32", "tickets": "*i32"}
        for block in (1, 4096):
            one = {"n": 1} if block == 1 else {}  # Triton makes an argument of 1 a constant of the program
            job(capability, _largest, {"x": vector, "magnitudes": integers, "keep": "i32", **selected, "n": "i32"}, {"BITS": bits, "BLOCK": block, "TICKETS": TICKETS, **one}, _warps(block))
            job(capability, _above, {"x": vector, "threshold": "fp32", **selected, "n": "i32"}, {"NONZERO": block == 1, "BLOCK": block, "TICKETS": TICKETS, **one}, _warps(block))
        for single in ({}, {"n_out": 1}, {"splits": 1}):
            blocks = {"BLOCK_OUT": _BLOCK_OUT, "BLOCK_ROWS": _BLOCK_ROWS, "HAS_BIAS": True, **single}
            pointers = {"x": vector, "weight": vector, "rows": "*i32", "count": "*i32", "tickets": "*i32", "sums": "*fp32", "bias": vector, "out": vector}
            job(capability, _product, {**pointers, "n_out": "i32", "splits": "i32"}, blocks, _WARPS)


def job(capability: int, kernel: object, signature: dict[str, str], constants: dict[str, int], warps: int) -> None:
    whole = {**signature, **dict.fromkeys(constants, "constexpr")}
    made = compile(ASTSource(kernel, whole, constexprs=constants), target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    sys.stdout.write(f"{kernel.__name__} {whole['out'] if 'out' in whole else whole['kept'] if 'kept' in whole else whole['x']}: cubin of {len(made.asm['cubin'])} bytes\n")  # type: ignore[attr-defined]


if __name__ == "__main__":
    main(int(sys.argv[1]))
