"""Single products over packed weights, dense and with chosen rows: bytes a second against the machine's."""

from __future__ import annotations

import ctypes
import dataclasses
import time
from typing import Any

import torch

from core.progress import Progress, silent
from engines.speed.bandwidth import read_bandwidth
from kernels.arguments import pointers, sizes
from kernels.build import native
from kernels.channels import largest
from kernels.huge_pages import in_huge_pages
from kernels.packing import KINDS, PackedWeight, pack

_BEYOND_CACHE = 400 * 2**20
"""Copies of the matrix that are gone through, so that none is found in a cache."""


def time_kernels(*, in_features: int = 2048, out_features: int = 5632, keep: float = 0.6, rounds: int = 5, progress: Progress = silent) -> dict[str, Any]:
    """Rows by kind of weight: all rows, and the `keep` largest inputs' rows, tile by tile and row by row."""
    library = native().library
    if library is None:
        return {"error": native().reason}
    out: dict[str, Any] = {"in_features": in_features, "out_features": out_features, "keep": keep, "read_bandwidth": read_bandwidth(), "rows": []}
    for place, kind in enumerate(KINDS):
        progress(place / len(KINDS), kind)
        packed = pack(torch.randn(out_features, in_features), kind)
        for name, weight, share in (("dense", packed, 1.0), ("chosen rows, tiles together", packed, keep), ("chosen rows, rows together", packed.rows_together(), keep)):
            seconds = _time(library, weight, share, rounds)
            out["rows"].append({"kind": kind, "how": name, "seconds": seconds, "bytes_s": weight.nbytes * share / seconds, "speedup_vs_dense": None})
        dense = out["rows"][-3]["seconds"]
        for row in out["rows"][-3:]:
            row["speedup_vs_dense"] = dense / row["seconds"]
    return out


def _time(library: ctypes.CDLL, weight: PackedWeight, share: float, rounds: int) -> float:
    copies = [dataclasses.replace(weight, data=in_huge_pages(weight.data.clone())) for _ in range(max(2, _BEYOND_CACHE // weight.nbytes))]
    matrices = [copy.matrix() for copy in copies]
    x, y = torch.randn(weight.in_features), torch.empty(weight.out_features)
    rows = largest(x, round(share * weight.in_features)) if share < 1 else None
    count = weight.in_features if rows is None else rows.numel()
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        for matrix in matrices:
            library.fusebox_gemv(ctypes.byref(matrix), *pointers(y, x, rows), *sizes(count))
        best = min(best, (time.perf_counter() - began) / len(matrices))
    return best
