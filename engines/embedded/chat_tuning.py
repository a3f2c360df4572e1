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

from core.datasets import is_held_out, read_corpus
from core.losses import IGNORE, linear_cross_entropy
from core.progress import Progress, Stop, silent
from core.training import TrainingPlan, TrainingReport, train
from engines.embedded.backbone import SHARD_WEIGHTS, encode_documents, hidden_matrices, weighted_documents
from engines.embedded.extracts import paragraphs
from engines.embedded.instructions import conversations, extract_talk, load_instructions
from engines.embedded.short_attention import use_short_row_attention
from engines.embedded.tokenizer import ASSISTANT, END, SYSTEM, USER
from engines.embedded.windows import corpus_windows
from engines.prompting import Message

log = logging.getLogger(__name__)

SHARD_SIZE = "9MB"
EXTRACT_SHARDS = ("science", "climate", "ai_ml", "general")


@dataclass(frozen=True)
class ChatPlan:
    """Budget of one tuning run."""

    epochs: int = 9
    batch_tokens: int = 8192
    length: int = 1024  # longer conversations are left out
    corpus_tokens: int = 250_000  # windows of plain text an epoch, half of them with a repeated passage; four times as many in the first
    corpus_extracts: int = 250  # paragraphs of the corpus to summarise by their own sentences, an epoch
    learning_rate: float = 1e-3
    muon_learning_rate: float = 6e-3
    seed: int = 0


Row = tuple[list[int], list[int]]
"""Token ids and their labels, IGNORE where nothing is learned."""


def encode_talk(talk: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> Row:
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


def batches(rows: Sequence[Row], tokens: int, pad: int, rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows of like length side by side, none cut and none after another: each is seen from position 0, as in the app.

    Returns:
        shuffled batches of ids and labels, both [rows, longest] int64, about `tokens` padded tokens each. Padding is on
        the right, where causal attention never looks back at it.
    """
    order = sorted(rng.permutation(len(rows)), key=lambda i: len(rows[i][0]))
    out, start = [], 0
    while start < len(order):
        end = start + 1
        while end < len(order) and len(rows[order[end]][0]) * (end + 1 - start) <= tokens:
            end += 1
        chosen = [rows[i] for i in order[start:end]]
        longest = max(len(ids) for ids, _ in chosen)
        ids = np.full((len(chosen), longest), pad, dtype=np.int64)
        labels = np.full((len(chosen), longest), IGNORE, dtype=np.int64)
        for place, (row_ids, row_labels) in enumerate(chosen):
            ids[place, : len(row_ids)] = row_ids
            labels[place, : len(row_labels)] = row_labels
        out.append((ids, labels))
        start = end
    return [out[i] for i in rng.permutation(len(out))]


def _talk_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    base: Any = getattr(model, "module", model)
    ids, labels = batch
    hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    learned = wanted != IGNORE
    return linear_cross_entropy(hidden[learned], base.lm_head.weight, wanted[learned])


class _Corpus:
    """The pretraining text as windows and as paragraphs to summarise."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        documents = weighted_documents([d for d in read_corpus(folder) if not is_held_out(d.source)], SHARD_WEIGHTS, seed)
        self.stream = encode_documents(documents, tokenizer)
        self.paragraphs = sorted(set(paragraphs([d for d in documents if d.shard in EXTRACT_SHARDS])))

    def windows(self, plan: ChatPlan, epoch: int) -> list[Row]:
        tokens = plan.corpus_tokens * (4 if epoch == 0 else 1)
        return [(w.tolist(), w.tolist()) for w in corpus_windows(self.stream, tokens, epoch, plan.seed)]

    def extracts(self, plan: ChatPlan, epoch: int) -> list[list[Message]]:
        rng = np.random.default_rng((plan.seed, epoch, 2))
        count = min(plan.corpus_extracts, len(self.paragraphs))
        return [extract_talk(self.paragraphs[i], rng) for i in rng.choice(len(self.paragraphs), count, replace=False)]


def _schedule(tokenizer: PreTrainedTokenizerBase, plan: ChatPlan, corpus: Path | None, progress: Progress) -> list[tuple[np.ndarray, np.ndarray]]:
    """Every batch of a run, in order: its epochs' conversations and corpus windows, mixed."""
    data = load_instructions()
    text = _Corpus(corpus, tokenizer, plan.seed) if corpus is not None else None
    out: list[tuple[np.ndarray, np.ndarray]] = []
    for epoch in range(plan.epochs):
        progress(0.0, f"encoding epoch {epoch + 1}/{plan.epochs}")
        talks = conversations(data, epoch, plan.seed) + (text.extracts(plan, epoch) if text else [])
        rows = [r for r in (encode_talk(t, tokenizer) for t in talks) if len(r[0]) <= plan.length]
        rows += text.windows(plan, epoch) if text else []
        out += batches(rows, plan.batch_tokens, int(tokenizer.pad_token_id), np.random.default_rng((plan.seed, epoch, 3)))
    return out


def train_chat(
    backbone: Path, output: Path, work: Path, plan: ChatPlan, *, corpus: Path | None = None, progress: Progress = silent, stop: Stop | None = None,
) -> TrainingReport:
    """Tune `backbone` on the instruction set and write the chat model to `output` as bf16 shards under 10 MB.

    Args:
        backbone: folder of a pretrained backbone, tokenizer included.
        output: model folder to write; its model card is written by `evaluate-chat`.
        work: folder for the checkpoint that an interrupted run resumes from.
        corpus: folder of the pretraining text, mixed in against forgetting and for copying; without it the model is tuned
            on the instruction set alone.
    """
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
    use_short_row_attention(model)
    schedule = _schedule(tokenizer, plan, corpus, progress)
    steps = len(schedule)
    log.info("%d steps, %.2f M tokens", steps, sum(ids.size for ids, _ in schedule) / 1e6)

    def batch_at(step: int, process: int, processes: int) -> tuple[Tensor, Tensor]:
        ids, labels = schedule[step]
        return torch.from_numpy(ids[process::processes]).to(model.device), torch.from_numpy(labels[process::processes]).to(model.device)

    report = train(
        model, _talk_loss, batch_at,
        TrainingPlan(steps=steps, learning_rate=plan.learning_rate, muon_learning_rate=plan.muon_learning_rate, weight_decay=0.02,
                     warmup_steps=min(40, steps // 10 + 1), schedule="trapezoid", seed=plan.seed),
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
    model.set_attn_implementation("sdpa")
    model.bfloat16().save_pretrained(output, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(output)
