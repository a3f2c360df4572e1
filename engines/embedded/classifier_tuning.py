"""Fine-tuning of a language model into a classifier: the embedded one, and any other by the same command."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.classifier import Accuracy, Classifier, accuracy, class_logits, encode, padded
from core.errors import CalibrationError, InvalidRequest
from core.files import write_text
from core.labelled_data import LabelledData
from core.progress import Progress, Stop, silent
from core.provenance import provenance
from core.training import TrainingPlan, TrainingReport, train
from engines.embedded.chat_tuning import save_embedded


@dataclass(frozen=True)
class ClassifierPlan:
    """Budget of one fine-tuning run.

    word_dropout: share of tokens of each training text that are replaced by the padding token, so that no single word decides.
    """

    epochs: int = 6
    learning_rate: float = 3e-4
    batch: int = 32
    max_tokens: int = 128
    word_dropout: float = 0.1
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.epochs, int) or self.epochs < 1 or self.batch < 1:
            raise InvalidRequest(f"epochs is {self.epochs} and batch {self.batch}; both must be at least 1.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InvalidRequest(f"learning_rate is {self.learning_rate}; it must be a finite number above 0.")
        if not 0 <= self.word_dropout < 1:
            raise InvalidRequest(f"word_dropout is {self.word_dropout}; it must be at least 0 and below 1.")


def _epoch(rows: Sequence[Sequence[int]], labels: Sequence[int], plan: ClassifierPlan, epoch: int, pad: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Batches of one shuffled pass, texts of like length together: ids, mask, labels."""
    rng = np.random.default_rng((plan.seed, epoch))
    shuffled = rng.permutation(len(rows))
    pools = [sorted(shuffled[i : i + 16 * plan.batch], key=lambda k: len(rows[k])) for i in range(0, len(rows), 16 * plan.batch)]
    chosen = [pool[i : i + plan.batch] for pool in pools for i in range(0, len(pool), plan.batch)]
    out = []
    for place in rng.permutation(len(chosen)):
        ids, mask = padded([rows[i] for i in chosen[place]], pad)
        kept = torch.from_numpy(rng.random(ids.shape) >= plan.word_dropout)
        kept[:, 0] = True
        last = mask.sum(1) - 1
        kept[torch.arange(len(ids)), last] = True  # its place tells where the text ends
        out.append((torch.where(kept, ids, torch.full_like(ids, pad)), mask, torch.tensor([labels[i] for i in chosen[place]])))
    return out


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    ids, mask, labels = batch
    return nn.functional.cross_entropy(model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float(), labels)


def tune_classifier(
    classifier: Classifier, data: LabelledData, plan: ClassifierPlan, *, checkpoint: Path | None = None, progress: Progress = silent, stop: Stop | None = None,
) -> TrainingReport:
    """Train every weight of `classifier` on `data.train`, in place.

    Raises:
        CalibrationError: there is nothing to train on, or the loss is not finite.
        InvalidRequest: the data set is a choice between endings, which a language model answers without training.
    """
    if data.is_choice:
        raise InvalidRequest(f"{data.name} asks for the likelier of two endings; a language model answers that as it is, there is no classifier to train.")
    examples = data.train[: plan.limit]
    if not examples:
        raise CalibrationError(f"{data.name} has no training examples that are not in its validation part.")
    rows, labels = encode(classifier, examples, plan.max_tokens), [e.label for e in examples]
    pad = int(classifier.tokenizer.pad_token_id)
    model = classifier.model
    device = next(model.parameters()).device
    steps_an_epoch = len(_epoch(rows, labels, plan, 0, pad))
    epochs: dict[int, list[Any]] = {}

    def batch_at(step: int, process: int, processes: int) -> tuple[Tensor, ...]:
        epoch, place = divmod(step, steps_an_epoch)
        if epoch not in epochs:
            epochs.clear()
            epochs[epoch] = _epoch(rows, labels, plan, epoch, pad)
        return tuple(part[process::processes].to(device) for part in epochs[epoch][place])

    model.requires_grad_(True)
    try:
        steps = plan.epochs * steps_an_epoch
        return train(
            model, _loss, batch_at,
            TrainingPlan(steps=steps, learning_rate=plan.learning_rate, weight_decay=0.05, warmup_steps=steps // 10 + 1, schedule="linear", seed=plan.seed),
            checkpoint=checkpoint, progress=progress, stop=stop,
        )
    finally:
        model.requires_grad_(False)


def validate(classifier: Classifier, data: LabelledData, limit: int | None = None) -> Accuracy:
    """Accuracy on the validation part."""
    examples = data.validation[:limit]
    return accuracy(class_logits(classifier, examples), [e.label for e in examples])


def save_classifier(classifier: Classifier, data: LabelledData, plan: ClassifierPlan, report: TrainingReport, output: Path, base: str) -> Accuracy:
    """Write the model as bf16 shards under 10 MB and its card, score what was written, and say how good that is."""
    save_embedded(classifier.model, classifier.tokenizer, output)
    scored = validate(classifier, data)  # the model is in bfloat16 now, as a later load finds it
    figures = {
        "base": base, "dataset": data.name, "labels": data.labels, "train_examples": len(data.train[: plan.limit]), "validation_examples": scored.examples,
        "accuracy": scored.share, "interval": scored.interval, "calibration_error": scored.calibration_error, "chance": data.chance,
        "plan": asdict(plan), "steps": report.steps, "seconds": report.seconds, "last_loss": report.losses[-1][1] if report.losses else None, "provenance": provenance(),
    }
    write_text(output / "training.json", json.dumps(figures, indent=1) + "\n")
    low, high = scored.interval
    write_text(output / "README.md", f"""# Classifier

{base} with a sequence-classification head, fine-tuned on {data.name} ({', '.join(data.labels)}) by `cli.py train classifier`.

* Validation accuracy {scored.share:.1%} (95 % interval {low:.1%} to {high:.1%}) on {scored.examples:,} examples that were not trained on; always saying the commonest label gets {data.chance:.1%}.
* Expected calibration error {scored.calibration_error:.3f} (15 bins).
* {figures['train_examples']:,} training examples, {plan.epochs} epochs, {report.seconds:.0f} s.

All figures: training.json.
""")
    return scored
