"""Corpus windows for tuning: plain text against forgetting, and repeated passages that teach copying from the context."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from core.datasets import TokenStream


def echo(window: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """The window with one passage of it repeated further on, so that attention to the first saying predicts the second.

    One passage in four has its tokens shuffled: nothing but the context can predict those.
    """
    length = len(window)
    size = int(rng.integers(8, max(9, length // 3)))
    first = int(rng.integers(1, length - 2 * size)) if length > 2 * size + 1 else 1
    second = int(rng.integers(first + size, length - size + 1))
    out = window.copy()
    passage = out[first : first + size].copy()
    if rng.random() < 0.25:
        passage = rng.permutation(passage)
        out[first : first + size] = passage
    out[second : second + size] = passage
    return out


def corpus_windows(
    stream: TokenStream, tokens: int, epoch: int, seed: int, echoed: float = 0.5, lengths: tuple[int, ...] = (128, 256, 1024)
) -> Iterator[NDArray[np.int64]]:
    """About `tokens` tokens of windows, as many tokens of each length; a share `echoed` of them holds a repeated passage."""
    rng = np.random.default_rng((seed, epoch, 1))
    for length in lengths:
        count = tokens // len(lengths) // length
        for place in range(count):
            window = stream.window(epoch * count + place, length, seed).numpy()
            yield echo(window, rng) if rng.random() < echoed else window
