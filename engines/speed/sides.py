"""One side of a paired measurement of decode: our bundle or a rival, with its cache at the stated context."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from core.bundle import Bundle, storage_bytes, tensors_of
from core.decoding import decode_one_token, prefill
from core.progress import Stop
from engines.speed.peers.own_thread import here
from engines.speed.peers.peer import Peer

_WARM_UP = 2
_FIRST = 17


def prompt(tokens: int) -> list[int]:
    """The same random ids for every side."""
    return torch.randint(10, 8000, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()


@dataclass
class Side:
    """What is timed.

    step: a token -> the next token, greedily. crop: forgets the last n tokens. logits: after the context, [vocab_size].
    bytes_per_token: weights and cache entries that one step reads, asked after the steps. thread: where the steps run.
    """

    executor: str
    step: Callable[[int], int]
    crop: Callable[[int], Any]
    logits: np.ndarray[Any, Any]
    bytes_per_token: Callable[[], int]
    settings: dict[str, Any] | None = None
    thread: Callable[..., Any] = here
    steps_s: list[float] = field(default_factory=list)

    @classmethod
    def of_bundle(cls, bundle: Bundle, context: int) -> Side:
        """A bundle after `context` tokens."""
        cache = bundle.cache_factory()
        logits = prefill(bundle, prompt(context), cache, Stop())
        assert logits is not None
        executor = "native" if bundle.decoder is not None else "torch"
        side = cls(executor, lambda token: int(decode_one_token(bundle, token, cache).argmax()), lambda n: cache.crop(-n), logits.float().numpy(), lambda: bytes_per_token(bundle, context))
        return side.warmed_up()

    @classmethod
    def of_peer(cls, load: Callable[[], Peer], context: int, thread: Callable[..., Any] = here) -> Side:
        """A rival after `context` tokens, in the faster of the settings that it chooses between; everything of it runs in `thread`."""
        ids = prompt(context)
        peer: Peer = thread(load)
        thread(peer.settle, ids, "decode")
        logits = thread(peer.prefill, ids).copy()
        read = peer.weight_bytes + context * peer.kv_bytes_per_token
        return cls(peer.executor, lambda token: int(peer.decode(token).argmax()), peer.crop, logits, lambda: read, peer.settings, thread).warmed_up()

    def warmed_up(self) -> Side:
        """This side after some steps that do not count."""
        self.run(_WARM_UP)
        self.steps_s = []
        return self

    def run(self, tokens: int) -> None:
        """Decode some tokens, keep the time of each, and put the cache back."""
        self.thread(self._run, tokens)

    def _run(self, tokens: int) -> None:
        token = _FIRST
        for _ in range(tokens):
            began = time.perf_counter()
            token = self.step(token)
            self.steps_s.append(time.perf_counter() - began)
        self.crop(tokens)


def in_turns(reference: Side, side: Side, tokens: int, rounds: int) -> float:
    """Run both ABBA, `side` for twice the tokens, and say how many times as fast as `reference` it was, by the medians of these steps."""
    before = len(reference.steps_s), len(side.steps_s)
    for _ in range(rounds):
        for one in (reference, side, side, reference):
            one.run(tokens if one is reference else 2 * tokens)
    return statistics.median(reference.steps_s[before[0] :]) / statistics.median(side.steps_s[before[1] :])


def bytes_per_token(bundle: Bundle, context: int) -> int:
    """Weights and cache entries that one step reads."""
    config: Any = bundle.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv = 2 * config.num_hidden_layers * heads * dim * context * next(bundle.model.parameters()).element_size()
    decoder: Any = bundle.decoder
    if decoder is not None:
        return int(decoder.compiled.program.weight_bytes_per_step(decoder.steps)) + kv
    everything = storage_bytes(tensors_of([bundle.model]))
    table: Any = bundle.model.get_input_embeddings()
    by_the_head = storage_bytes(tensors_of([bundle.model.get_output_embeddings()]))
    unread = sum(size for address, size in storage_bytes([table.weight]).items() if address not in by_the_head)
    return sum(everything.values()) - unread + kv


def cosine(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """Of two vectors of logits: that a rival runs the same model."""
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))
