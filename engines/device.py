"""Which device a person asks for, checked before anything is loaded."""

from __future__ import annotations

import re

import torch

from core.errors import InvalidRequest


def check_device(device: str) -> str:
    """`auto` becomes cuda where there is one, else cpu.

    Raises:
        InvalidRequest: no such device here.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if found else "cpu"
    if device == "cpu":
        return device
    if not re.fullmatch(r"cuda(:\d{1,3})?", device):
        raise InvalidRequest(f"device is {device[:30]!r}; use cpu, cuda, cuda:N or auto.")
    if not found:
        raise InvalidRequest(f"device is {device}, and PyTorch finds no CUDA device here. Use cpu, or install a CUDA build of torch on a machine with a GPU.")
    if int(device.partition(":")[2] or 0) >= found:
        raise InvalidRequest(f"device is {device}; there are {found} CUDA devices here, counted from 0.")
    return device
