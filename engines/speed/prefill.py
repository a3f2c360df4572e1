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
from engines.speed.peers.names import load_peer, peer_methods, thread_for
from engines.speed.shapes import apply_methods, load_shape
from engines.speed.sides import prompt
from kernels.build import native
from kernels.gemm import bf16_way
from kernels.packed_linear import PackedLinear

DEFAULT_METHODS = ("native+vattention:bfloat16", "native+int8:bfloat16", "native+int4:bfloat16")


@torch.inference_mode()
def _plain(bundle: Bundle, ids: list[int]) -> None:
    bundle.model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1)


def _chunked(bundle: Bundle, ids: list[int]) -> None:
    prefill(bundle, ids, bundle.cache_factory(), Stop())


def _executor(bundle: Bundle) -> str:
    """What computes a prompt."""
    packed = native().library is not None and any(isinstance(module, PackedLinear) for module in bundle.model.modules())
    return f"torch, products in C ({bf16_way()})" if packed else "torch"


def time_prefill(
    shape: str, methods: Sequence[str] = DEFAULT_METHODS, peers: Sequence[str] = (), *, tokens: int = 256, rounds: int = 5, progress: Progress = silent,
) -> dict[str, Any]:
    """Rows of every method and every rival on a prompt of `tokens` tokens; ABBA against transformers in bfloat16.

    Args:
        peers: as `peer_methods` reads them; each is also measured in turns with our method of about the same bytes ("speedup_vs_peer" of that row).

    Returns:
        "shape", "tokens", "chunk", "rows"; a row that failed holds "error".

    Raises:
        InvalidRequest: as `parse_timed_method` and `peer_methods`.
    """
    rivals = peer_methods(peers)
    base = load_shape(shape, "bfloat16")
    ids = prompt(tokens)
    out: dict[str, Any] = {"shape": shape, "tokens": tokens, "chunk": PREFILL_CHUNK, "rows": []}
    reference = partial(_plain, base, ids)

    def prepared(name: str) -> Bundle:
        return base if name == BASELINES[1] else apply_methods(base, ordered(parse_timed_method(name)[0]))

    def ours(name: str, bundle: Bundle) -> Callable[[], Any]:
        return reference if name == BASELINES[1] else partial(_chunked, bundle, ids)

    for place, name in enumerate((BASELINES[1], *methods, *rivals)):
        progress(place / (len(methods) + len(rivals) + 1), name)
        row: dict[str, Any] = {"method": name}
        out["rows"].append(row)
        try:
            if name not in rivals:
                bundle = prepared(name)
                row |= {"executor": _executor(bundle)} | _measure(ours(name, bundle), reference, tokens, rounds)
                continue
            thread = thread_for(name)
            peer = thread(load_peer, name, base, tokens)
            thread(peer.settle, ids, "prefill")
            theirs = partial(thread, peer.prefill, ids)
            row |= _measure(theirs, reference, tokens, rounds) | {"executor": peer.executor, "settings": peer.settings}
            for one in out["rows"]:
                if one["method"] in counterparts(name, methods) and "error" not in one:
                    one.setdefault("speedup_vs_peer", {})[name] = _measure(ours(one["method"], prepared(one["method"])), theirs, tokens, rounds)["speedup_vs_baseline"]
        except FuseboxError as error:
            row["error"] = str(error)
    return out


def _measure(run: Callable[[], Any], reference: Callable[[], Any], tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of `run`, in turns with `reference`; the speed-up is the median of the rounds', since the machine's speed drifts between them."""
    run()
    reference()
    speeds: list[float] = []
    ratios: list[float] = []
    for _ in range(rounds):
        took: dict[bool, list[float]] = {True: [], False: []}
        for mine in (False, True, True, False):
            began = time.perf_counter()
            (run if mine else reference)()
            took[mine].append(time.perf_counter() - began)
        speeds += [tokens / seconds for seconds in took[True]]
        ratios.append(sum(took[False]) / sum(took[True]))
    return {
        "prefill_tok_s": statistics.median(speeds), "p10": percentile(speeds, 0.1), "p90": percentile(speeds, 0.9),
        "speedup_vs_baseline": statistics.median(ratios), "speedups": ratios, "runs": len(speeds),
    }
