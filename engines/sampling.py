"""How the next token is chosen. The request's values are checked here, whoever sent them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from core.errors import InvalidRequest

MAX_NEW_TOKENS = 32_768
_GREEDY_BELOW = 1e-3


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. A temperature below 0.001 is greedy; top_k 0 and top_p 1 leave all tokens in."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _whole("max_new_tokens", self.max_new_tokens, 1, MAX_NEW_TOKENS)
        _real("temperature", self.temperature, 0.0, 5.0)
        _real("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _whole("top_k", self.top_k, 0, 1_000_000)
        _real("repetition_penalty", self.repetition_penalty, 0.5, 3.0)
        _whole("seed", self.seed, 0, 2**63 - 1)
        if not isinstance(self.ignore_eos, bool):
            raise InvalidRequest(f"ignore_eos is {_shown(self.ignore_eos)}; it is a switch, true or false.")


def _real(name: str, value: Any, low: float, high: float, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (isinstance(value, float) and math.isnan(value)):
        raise InvalidRequest(f"{name} is {_shown(value)}; it must be a number between {low:g} and {high:g}.")
    if not low <= value <= high or (open_low and value == low):
        raise InvalidRequest(f"{name} is {_shown(value)}; it must be {'above' if open_low else 'at least'} {low:g} and at most {high:g}.")


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} is {_shown(value)}; it must be a whole number between {low} and {high}.")
    if not low <= value <= high:
        raise InvalidRequest(f"{name} is {_shown(value)}; it must be between {low} and {high}.")


def _shown(value: Any) -> str:
    return "empty" if value is None else repr(value)[:40]


def sampling_from(values: dict[str, Any]) -> Sampling:
    """Sampling from a form's or a client's values: whole numbers may arrive as floats, missing ones keep their default.

    Raises:
        InvalidRequest: a value is out of range or of the wrong kind; names it.
    """
    cleaned: dict[str, Any] = {}
    for name, value in values.items():
        if name not in Sampling.__dataclass_fields__:
            raise InvalidRequest(f"There is no sampling setting {str(name)[:40]!r}; there are {', '.join(Sampling.__dataclass_fields__)}.")
        default = Sampling.__dataclass_fields__[name].default
        is_whole = isinstance(default, int) and not isinstance(default, bool)
        cleaned[name] = int(value) if is_whole and isinstance(value, float) and value.is_integer() else value
    return Sampling(**cleaned)


class Sampler:
    """Chooses tokens for one request; its random numbers are its own, so requests cannot disturb each other."""

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int], device: torch.device) -> None:
        self._generator = torch.Generator(device=device).manual_seed(sampling.seed)
        self._seen = list(prompt_ids)
        self._processors = LogitsProcessorList()
        if sampling.repetition_penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        self._greedy = sampling.temperature < _GREEDY_BELOW
        if not self._greedy:
            if sampling.temperature != 1.0:
                self._processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k:
                self._processors.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1.0:
                self._processors.append(TopPLogitsWarper(float(sampling.top_p)))

    def next_token(self, logits: Tensor) -> int:
        """The next token id from [vocab_size] logits."""
        scores = logits.float()[None]
        if self._processors:
            seen: Any = torch.tensor([self._seen], device=logits.device)
            scores = self._processors(seen, scores)  # type: ignore[arg-type]
        chosen = scores[0].argmax() if self._greedy else torch.multinomial(scores[0].softmax(-1), 1, generator=self._generator)
        token = int(chosen)
        self._seen.append(token)
        return token
