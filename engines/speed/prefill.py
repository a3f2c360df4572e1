"""Prefill speed: a prompt read in chunks over our cache, or by a rival, against one plain forward call of transformers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from core.bundle import Bundle
from core.compatibility import ordered
from core.decoding import PREFILL_CHUNK, prefill
from core.errors import FuseboxError
from core.progress import Progress, Stop, silent
from engines.metrics import percentile
from engines.speed.decode import BASELINES, counterparts, parse_timed_method
from engines.speed.peers.names import load_peer, peer_methods
from engines.speed.shapes import apply_methods, load_shape
from engines.speed.sides import prompt

DEFAULT_METHODS = ("native+vattention:bfloat16", "native+int8:bfloat16")


@torch.inference_mode()
def _plain(bundle: Bundle, ids: list[int]) -> None:
    bundle.model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1)


def _chunked(bundle: Bundle, ids: list[int]) -> None:
    prefill(bundle, ids, bundle.cache_factory(), Stop())


def time_prefill(
    shape: str, methods: Sequence[str] = DEFAULT_METHODS, peers: Sequence[str] = (), *, tokens: int = 256, rounds: int = 3, progress: Progress = silent,
) -> dict[str, Any]:
    """Rows of every method and every rival on a prompt of `tokens` tokens; ABBA against transformers in bfloat16.

    Args:
        peers: as `peer_methods` reads them; each is also measured in turns with our method of about the same bytes ("speedup_vs_peer" of that row).

    Raises:
        InvalidRequest: as `parse_timed_method` and `peer_methods`.
    """
    rivals = peer_methods(peers)
    base = load_shape(shape, "bfloat16")
    ids = prompt(tokens)
    out: dict[str, Any] = {"shape": shape, "tokens": tokens, "chunk": PREFILL_CHUNK, "rows": []}
    reference = partial(_plain, base, ids)

    def ours(name: str) -> Callable[[], Any]:
        return reference if name == BASELINES[1] else partial(_chunked, apply_methods(base, ordered(parse_timed_method(name)[0])), ids)

    for place, name in enumerate((BASELINES[1], *methods, *rivals)):
        progress(place / (len(methods) + len(rivals) + 1), name)
        row: dict[str, Any] = {"method": name}
        out["rows"].append(row)
        try:
            if name not in rivals:
                row |= _measure(ours(name), reference, tokens, rounds)
                continue
            peer = load_peer(name, base, tokens)
            peer.settle(ids, "prefill")
            theirs = partial(peer.prefill, ids)
            row |= _measure(theirs, reference, tokens, rounds) | {"executor": peer.executor, "settings": peer.settings}
            for one in out["rows"]:
                if one["method"] in counterparts(name, methods) and "error" not in one:
                    one.setdefault("speedup_vs_peer", {})[name] = _measure(ours(one["method"]), theirs, tokens, rounds)["speedup_vs_baseline"]
        except FuseboxError as error:
            row["error"] = str(error)
    return out


def _measure(run: Callable[[], Any], reference: Callable[[], Any], tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of `run`, in turns with `reference`."""
    speeds: tuple[list[float], list[float]] = ([], [])
    run()
    reference()
    for _ in range(rounds):
        for mine in (False, True, True, False):
            began = time.perf_counter()
            (run if mine else reference)()
            speeds[mine].append(tokens / (time.perf_counter() - began))
    median = statistics.median(speeds[True])
    return {"prefill_tok_s": median, "p10": percentile(speeds[True], 0.1), "p90": percentile(speeds[True], 0.9), "speedup_vs_baseline": median / statistics.median(speeds[False]), "runs": len(speeds[True])}
