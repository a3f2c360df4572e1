"""What a tensor holds, as a short text: chunks are hashed by several threads, since one alone reads slower than the disk."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_CHUNK = 2**20


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 over shape, dtype, order in memory and bytes: 64 hexadecimal digits.

    Args:
        tensor: any shape and dtype; a transposed view is hashed as it lies, without a copy.
    """
    flat = tensor.detach().cpu()
    order = "rows"
    if flat.ndim == 2 and not flat.is_contiguous() and flat.T.is_contiguous():
        flat, order = flat.T, "columns"
    data = flat.contiguous().reshape(-1).view(torch.uint8).numpy()
    starts = range(0, data.size, _CHUNK)

    def chunk(start: int) -> bytes:
        return hashlib.sha256(data[start : start + _CHUNK].data).digest()

    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype} {order}".encode())
    if len(starts) < 2:
        digest.update(b"".join(map(chunk, starts)))
    else:
        with ThreadPoolExecutor(min(len(starts), torch.get_num_threads())) as pool:
            digest.update(b"".join(pool.map(chunk, starts)))
    return digest.hexdigest()
