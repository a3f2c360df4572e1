"""Matrix registers belong to a thread: what others configured survives our products, and what we configure for others is there."""

from __future__ import annotations

import ctypes

import pytest
import torch

from kernels.build import native
from kernels.gemm import bf16_way, gemm
from kernels.packing import pack
from kernels.tiles import tiles_configured

ROWS, LINE_BYTES = (8, 16), (64, 32)


@pytest.fixture(autouse=True)
def matrix_registers() -> None:
    if bf16_way() != "amx-bf16":
        pytest.skip("NOT RUN: this CPU has no matrix registers for bfloat16")


def configured() -> list[bytes]:
    """Each thread's configuration; asking exchanges it twice."""
    library = native().library
    assert library is not None
    room = ctypes.create_string_buffer(64 * torch.get_num_threads())
    library.fusebox_exchange_tiles(room)
    found = room.raw
    library.fusebox_exchange_tiles(room)
    return [found[start : start + 64] for start in range(0, 64 * torch.get_num_threads(), 64)]


def test_threads_have_what_was_asked_for_and_then_what_they_had() -> None:
    before = configured()
    with tiles_configured(ROWS, LINE_BYTES):
        for one in configured():
            assert one[0] == 1 and tuple(one[48:50]) == ROWS and (one[16], one[18]) == LINE_BYTES
    assert configured() == before


def test_a_prompt_leaves_the_configuration_as_it_was() -> None:
    with tiles_configured(ROWS, LINE_BYTES):
        wanted = configured()
        gemm(torch.randn(40, 96).bfloat16(), pack(torch.randn(200, 96), "int8"))
        assert configured() == wanted
