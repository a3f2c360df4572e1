"""A model that sorts texts into classes: loading, encoding, its logits over many examples, and how right and how sure of itself it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from core.bundle import ModelInfo
from core.errors import InvalidRequest, ModelLoadError
from core.evaluation import wilson_interval
from core.labelled_data import Example
from core.loading import DTYPES, locate, refuse_if_too_large
from core.progress import Progress, Stop, silent

PAIR = "\n"
"""Between two texts that belong together: causal language models know no separator token."""


@dataclass
class Classifier:
    """A sequence-classification model with its tokenizer. head_is_new: the checkpoint had none, so it answers at random until it is trained."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    info: ModelInfo
    labels: tuple[str, ...]
    head_is_new: bool = False

    @property
    def max_tokens(self) -> int:
        """Positions that the model was made for."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or 512)


def load_classifier(model_id: str, labels: Sequence[str], *, revision: str | None = None, dtype: str = "float32", allow_local: bool = True, progress: Progress = silent) -> Classifier:
    """Load a classifier, or a language model with a new head in place of its own.

    Raises:
        InvalidRequest: the checkpoint's head has another number of classes, or dtype is unknown.
        ModelNotFound, HubUnavailable, UnsafeCheckpoint, OutOfMemory, ModelLoadError.
    """
    if dtype not in DTYPES:
        raise InvalidRequest(f"dtype is {dtype!r}; use one of {', '.join(DTYPES)}.")
    folder, commit, source = locate(model_id, revision, progress, allow_local)
    refuse_if_too_large(folder, DTYPES[dtype])
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        trained = any("ForSequenceClassification" in name for name in config.architectures or ())
        if trained and config.num_labels != len(labels):
            raise InvalidRequest(f"{model_id} tells {config.num_labels} classes apart, the data set has {len(labels)}. Choose another data set or model.")
        config.num_labels = len(labels)
        config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        config.pad_token_id = tokenizer.pad_token_id  # the model finds a text's last token by it
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            folder, config=config, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False, local_files_only=True, output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError) as error:
        raise ModelLoadError(f"{model_id} cannot be loaded as a classifier: {(str(error).strip().splitlines() or [type(error).__name__])[0][:300]}") from error
    model, report = loaded
    new = [name for name in report["missing_keys"] if name.startswith("score")]
    lost = sorted(set(report["missing_keys"]) - set(new))
    if lost:
        raise ModelLoadError(f"{model_id} lacks {len(lost)} weights its architecture needs, {', '.join(lost[:3])} among them.")
    model.eval().requires_grad_(False)
    return Classifier(model, tokenizer, ModelInfo(model_id, commit, dtype, source), tuple(labels), bool(new))


def encode(classifier: Classifier, examples: Sequence[Example], max_tokens: int = 256) -> list[list[int]]:
    """Token ids of each example, cut at the end to `max_tokens`; a start token first where the tokenizer has one."""
    tokenizer = classifier.tokenizer
    texts = [PAIR.join(e.texts) for e in examples]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    limit = min(max_tokens, classifier.max_tokens)
    return [(start + ids)[:limit] for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]] if texts else []


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows side by side, padded on the right: ids and attention mask, both [rows, longest] int64."""
    longest = max(1, *(len(row) for row in rows)) if len(rows) > 1 else max(1, len(rows[0]))
    ids, mask = torch.full((len(rows), longest), pad), torch.zeros(len(rows), longest, dtype=torch.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
    return ids, mask


@torch.inference_mode()
def class_logits(classifier: Classifier, examples: Sequence[Example], *, batch: int = 32, max_tokens: int = 256, stop: Stop | None = None) -> NDArray[np.float32]:
    """Logits of each example, [N, classes] float32; texts of like length go through the model together. On Stop the rest are NaN."""
    rows = encode(classifier, examples, max_tokens)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    out = np.full((len(rows), len(classifier.labels)), np.nan, dtype=np.float32)
    device = next(classifier.model.parameters()).device
    for start in range(0, len(order), batch):
        if stop is not None and stop.requested:
            break
        chosen = order[start : start + batch]
        ids, mask = padded([rows[i] for i in chosen], int(classifier.tokenizer.pad_token_id))
        out[chosen] = classifier.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits.float().cpu().numpy()
    return out


@dataclass(frozen=True)
class Accuracy:
    """How right a classifier was. interval: Wilson, 95 %. calibration_error: expected, over 15 bins of confidence; 0 is best."""

    correct: int
    examples: int
    interval: tuple[float, float]
    calibration_error: float

    @property
    def share(self) -> float:
        """Share of examples that were right."""
        return self.correct / self.examples


def accuracy(logits: NDArray[np.float32], labels: Sequence[int], bins: int = 15) -> Accuracy:
    """Score logits [N, classes] against the right labels.

    Raises:
        InvalidRequest: no examples, or logits that are not numbers.
    """
    wanted = np.asarray(labels)
    if len(wanted) == 0 or len(logits) != len(wanted) or not np.isfinite(logits).all():
        raise InvalidRequest(f"Accuracy needs as many rows of finite logits as labels, at least one; there are {len(logits)} and {len(wanted)}.")
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    shares = shifted / shifted.sum(1, keepdims=True)
    right = logits.argmax(1) == wanted
    sure = shares.max(1)
    place = np.minimum((sure * bins).astype(int), bins - 1)
    error = sum(abs(right[place == b].mean() - sure[place == b].mean()) * (place == b).mean() for b in range(bins) if (place == b).any())
    correct = int(right.sum())
    return Accuracy(correct, len(wanted), wilson_interval(correct, len(wanted)), float(error))


def mcnemar(right_a: NDArray[np.bool_], right_b: NDArray[np.bool_]) -> float:
    """Two-sided exact p value that two classifiers err equally often on the same examples (McNemar 1947, binomial form)."""
    only_a, only_b = int((right_a & ~right_b).sum()), int((~right_a & right_b).sum())
    n, least = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    from math import comb

    return min(1.0, 2 * sum(comb(n, k) for k in range(least + 1)) / 2**n)
