"""Shapes with random weights."""

from __future__ import annotations

import pytest

from engines.speed.shapes import RELU_ZEROS, load_shape, relu_zeros
from engines.speed.sides import prompt


def test_relu_models_have_the_share_of_zeros_that_is_stated() -> None:
    model = load_shape("opt-125m", "bfloat16").model
    assert relu_zeros(model, prompt(64)) == pytest.approx(RELU_ZEROS, abs=0.05)


def test_other_models_have_none_to_state() -> None:
    assert relu_zeros(load_shape("embedded", "bfloat16").model, prompt(8)) is None
