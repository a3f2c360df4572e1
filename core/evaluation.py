"""Quality figures, scored as decode would run: each scored position goes through the model as a decode step does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.bundle import Bundle
from core.decoding import decode_one_token, prefill
from core.errors import InvalidRequest
from core.progress import Stop

EXEMPT_POSITIONS = 4
"""First positions of a text that are prefilled and not scored: attention sinks, which techniques exempt too."""


@dataclass(frozen=True)
class Score:
    """Negative log-likelihood of scored tokens.

    nll: nats, summed. tokens: number of tokens scored. text_bytes: UTF-8 bytes those tokens stand for.
    """

    nll: float
    tokens: int
    text_bytes: int

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between vocabularies; None when nothing was scored."""
        return self.nll / math.log(2) / self.text_bytes if self.text_bytes else None

    @property
    def perplexity(self) -> float | None:
        """Per token; comparable only within one vocabulary."""
        return math.exp(min(700.0, self.nll / self.tokens)) if self.tokens else None

    def __add__(self, other: Score) -> Score:
        return Score(self.nll + other.nll, self.tokens + other.tokens, self.text_bytes + other.text_bytes)


def logits_before(bundle: Bundle, prompt_ids: Sequence[int], continuation_ids: Sequence[int], stop: Stop) -> Iterator[Tensor]:
    """The logits [vocab_size], float32, before each continuation token: one prefill, then one decode step a token.

    Ends early when `stop` is requested.

    Raises:
        InvalidRequest: no prompt token.
    """
    if not prompt_ids:
        raise InvalidRequest("Scoring needs at least one token before the scored text.")
    if not continuation_ids:
        return
    cache = bundle.cache_factory()
    logits = prefill(bundle, prompt_ids, cache, stop)
    for place, token in enumerate(continuation_ids):
        if logits is None or stop.requested:
            return
        yield logits.float()
        if place + 1 < len(continuation_ids):
            logits = decode_one_token(bundle, token, cache)


def decode_logits(bundle: Bundle, prompt_ids: Sequence[int], continuation_ids: Sequence[int], stop: Stop | None = None) -> Tensor:
    """All of `logits_before` at once, [N, vocab_size]; for short texts, since it holds every row."""
    rows = list(logits_before(bundle, prompt_ids, continuation_ids, stop or Stop()))
    return torch.stack(rows) if rows else torch.empty(0, bundle.model.config.get_text_config().vocab_size)


def score_continuation(bundle: Bundle, prompt_ids: Sequence[int], continuation_ids: Sequence[int], stop: Stop | None = None) -> Score:
    """How likely the bundle finds `continuation_ids` after `prompt_ids`, under decode semantics.

    On Stop the tokens scored so far are returned.

    Raises:
        InvalidRequest: no prompt token.
    """
    nll, scored = 0.0, 0
    for logits, token in zip(logits_before(bundle, prompt_ids, continuation_ids, stop or Stop()), continuation_ids, strict=False):
        nll -= float(logits.log_softmax(-1)[token])
        scored += 1
    text = str(bundle.tokenizer.decode(list(continuation_ids[:scored]), skip_special_tokens=True))
    return Score(nll, scored, len(text.encode()))


def score_text(bundle: Bundle, text: str, max_tokens: int = 1024, exempt: int = EXEMPT_POSITIONS) -> Score:
    """Score a text token by token as decode would; the first `exempt` positions are prefilled and not counted."""
    ids = bundle.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start = bundle.tokenizer.bos_token_id
    ids = ([start] if start is not None else []) + ids[: max_tokens - 1]
    ids = ids[: bundle.context_length]
    exempt = max(1, exempt)
    return score_continuation(bundle, ids[:exempt], ids[exempt:])


def agreement(reference: Sequence[int], candidate: Sequence[int]) -> tuple[int, float | None]:
    """Tokens two answers share before they part, and that as a share of the longer one; None when both are empty."""
    shared = 0
    for a, b in zip(reference, candidate, strict=False):
        if a != b:
            break
        shared += 1
    longest = max(len(reference), len(candidate))
    return shared, (shared / longest if longest else None)


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a share (Wilson 1927); 95 % for z = 1.96.

    Raises:
        InvalidRequest: no trials.
    """
    if trials < 1:
        raise InvalidRequest("An interval needs at least one trial.")
    share, scale = successes / trials, 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)
