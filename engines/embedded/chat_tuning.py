"""Tuning of the backbone into the embedded chat model."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from core.losses import IGNORE, linear_cross_entropy
from core.progress import Progress, Stop, silent
from core.training import TrainingPlan, TrainingReport, train
from engines.embedded.backbone import hidden_matrices
from engines.embedded.instructions import conversations, load_instructions
from engines.embedded.tokenizer import ASSISTANT, END, SYSTEM, USER
from engines.prompting import Message

log = logging.getLogger(__name__)

SHARD_SIZE = "9MB"


@dataclass(frozen=True)
class ChatPlan:
    """Budget of one tuning run."""

    epochs: int = 3
    rows: int = 8
    length: int = 1024
    learning_rate: float = 1.5e-3
    muon_learning_rate: float = 1e-2
    seed: int = 0


def encode_talk(talk: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of a conversation as the chat template renders it, and labels: only what the assistant says is learned."""
    role_token = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
    ids, labels = [tokenizer.bos_token_id], [IGNORE]
    for message in talk:
        text = tokenizer(message["content"].strip(), add_special_tokens=False, verbose=False)["input_ids"]
        turn = [tokenizer.convert_tokens_to_ids(role_token[message["role"]]), *text, tokenizer.convert_tokens_to_ids(END)]
        learned = message["role"] == "assistant"
        ids += turn
        labels += [IGNORE, *turn[1:]] if learned else [IGNORE] * len(turn)
    return ids, labels


def pack(talks: Sequence[tuple[list[int], list[int]]], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Conversations side by side in rows of `length`, none cut; those longer than a row are left out.

    Returns:
        ids and labels, both [rows, length] int64.
    """
    rows: list[tuple[list[int], list[int]]] = []
    open_rows: list[int] = []
    for ids, labels in sorted((t for t in talks if len(t[0]) <= length), key=lambda t: -len(t[0])):
        for place in open_rows:
            if len(rows[place][0]) + len(ids) <= length:
                rows[place][0].extend(ids)
                rows[place][1].extend(labels)
                if len(rows[place][0]) > length - 24:
                    open_rows.remove(place)
                break
        else:
            rows.append((list(ids), list(labels)))
            open_rows.append(len(rows) - 1)
            open_rows = open_rows[-64:]
    padded = [(i + [pad] * (length - len(i)), t + [IGNORE] * (length - len(t))) for i, t in rows]
    return np.array([p[0] for p in padded], dtype=np.int64), np.array([p[1] for p in padded], dtype=np.int64)


def _talk_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    base: Any = getattr(model, "module", model)
    ids, labels = batch
    hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    return linear_cross_entropy(hidden.reshape(-1, hidden.shape[-1]), base.lm_head.weight, labels[:, 1:].reshape(-1))


def _packed_epochs(tokenizer: PreTrainedTokenizerBase, plan: ChatPlan) -> tuple[np.ndarray, np.ndarray]:
    data = load_instructions()
    rng = np.random.default_rng(plan.seed)
    parts = []
    for epoch in range(plan.epochs):
        ids, labels = pack([encode_talk(t, tokenizer) for t in conversations(data, epoch, plan.seed)], plan.length, tokenizer.pad_token_id)
        order = rng.permutation(len(ids))
        parts.append((ids[order], labels[order]))
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def train_chat(backbone: Path, output: Path, work: Path, plan: ChatPlan, *, progress: Progress = silent, stop: Stop | None = None) -> TrainingReport:
    """Tune `backbone` on the instruction set and write the chat model to `output` as bf16 shards under 10 MB.

    Args:
        backbone: folder of a pretrained backbone, tokenizer included.
        output: model folder to write; its model card is written by `evaluate-chat`.
        work: folder for the checkpoint that an interrupted run resumes from.
    """
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
    progress(0.0, "encoding the instruction set")
    ids, labels = _packed_epochs(tokenizer, plan)
    steps = len(ids) // plan.rows
    log.info("%d rows of %d tokens, %d steps", len(ids), plan.length, steps)

    def batch_at(step: int, process: int, processes: int) -> tuple[Tensor, Tensor]:
        rows = np.arange(step * plan.rows, (step + 1) * plan.rows)[process::processes]
        return torch.from_numpy(ids[rows]).to(model.device), torch.from_numpy(labels[rows]).to(model.device)

    report = train(
        model, _talk_loss, batch_at,
        TrainingPlan(steps=steps, learning_rate=plan.learning_rate, muon_learning_rate=plan.muon_learning_rate, weight_decay=0.02,
                     warmup_steps=min(20, steps // 10 + 1), schedule="linear", seed=plan.seed),
        matrices=hidden_matrices(model), checkpoint=work / "checkpoint", progress=progress, stop=stop,
    )
    if report.stopped is None:
        save_embedded(model, tokenizer, output)
        (work / "chat_plan.json").write_text(json.dumps({**asdict(plan), "steps": steps, "seconds": report.seconds}, indent=1))
    return report


def save_embedded(model: Any, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Write a model as bf16 safetensors shards under 10 MB, with its tokenizer."""
    output.mkdir(parents=True, exist_ok=True)
    for old in output.glob("*.safetensors*"):
        old.unlink()
    model.bfloat16().save_pretrained(output, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(output)
