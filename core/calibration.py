"""Text that techniques calibrate on: the project's own, or what the user gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.bundle import Bundle
from core.datasets import read_jsonl
from core.errors import CalibrationError

PROJECT_TEXT = Path(__file__).resolve().parent.parent / "assets" / "corpus" / "topics"
_FORMS = ("definition", "explanation", "how", "why", "example")


def project_texts(seed: int = 0) -> list[str]:
    """About two hundred thousand words written for this project, one text a topic, in a fixed shuffled order."""
    topics = [t for path in sorted(PROJECT_TEXT.glob("*.jsonl")) for t in read_jsonl(path)]
    if not topics:
        raise CalibrationError(f"There is no project text in {PROJECT_TEXT}. Give texts of your own.")
    order = np.random.default_rng(seed).permutation(len(topics))
    return ["\n\n".join(str(topics[i][form]) for form in _FORMS) for i in order]


def calibration_windows(bundle: Bundle, texts: Sequence[str] | None, tokens: int, length: int) -> list[Tensor]:
    """Windows of token ids, [1, length] each, `tokens` in all; each opens with BOS where the tokenizer has one.

    Args:
        texts: what to calibrate on; the project's own text when None.
        tokens: rounded up to whole windows.
        length: longest window; shortened to the model's context.

    Raises:
        CalibrationError: the texts hold fewer than `tokens` tokens, or than one window; says how many.
    """
    length = min(length, bundle.context_length)
    start = [] if bundle.tokenizer.bos_token_id is None else [int(bundle.tokenizer.bos_token_id)]
    body = length - len(start)
    wanted = max(1, -(-tokens // length)) * body
    ids: list[int] = []
    for text in project_texts() if texts is None else texts:
        ids += bundle.tokenizer(text + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= wanted:
            break
    if len(ids) < wanted:
        raise CalibrationError(f"The calibration text has {len(ids)} tokens; {wanted} are needed. Give more text, or set calibration_tokens lower.")
    return [torch.tensor([start + ids[i : i + body]], device=bundle.device) for i in range(0, wanted, body)]


def check_finite_weights(bundle: Bundle) -> None:
    """Refuse a model with broken weights before they spread.

    Raises:
        CalibrationError: names the first tensor that holds NaN or infinity.
    """
    for name, tensor in bundle.model.named_parameters():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CalibrationError(f"{name} holds NaN or infinite values, so nothing can be calibrated on {bundle.info.model_id}. Get the checkpoint again.")
