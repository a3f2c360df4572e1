"""Tuning of the backbone into the embedded chat model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
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
from engines.embedded.extracts import paragraphs, scrambled
from engines.embedded.instructions import Mix, conversations, extract_talk, garbled_questions, garbled_seconds, load_instructions
from engines.embedded.short_attention import use_short_row_attention
from engines.embedded.tokenizer import ASSISTANT, END, SYSTEM, USER
from engines.embedded.windows import corpus_windows
from engines.prompting import Message

log = logging.getLogger(__name__)

SHARD_SIZE = "9MB"
EXTRACT_SHARDS = ("science", "climate", "ai_ml", "general")
OPENING_TOKENS = 8
OPENING_ROWS = 20
OPENING_WEIGHT = 3
"""An answer's first tokens say which topic and form it is, and are a small share of all tokens: they count this many times."""


@dataclass(frozen=True)
class Stage:
    """One run of tuning.

    corpus_tokens: windows of plain text an epoch, half of them with a repeated passage; `first_corpus_tokens` in the first.
    corpus_extracts: paragraphs of the corpus to summarise by their own sentences, an epoch.
    scrambled_extracts: the same with the paragraph's words in another order, which only copying can answer.
    garbled: questions a topic with words missing and strange ones in between; of their answers only the opening is learned.
    garbled_seconds: the same for second questions, which do not name the topic.
    batch_tokens: padded tokens of one step. final_fraction: the rate at the end as a share of the peak; 1 keeps it.
    """

    epochs: int
    mix: Mix
    corpus_tokens: int
    first_corpus_tokens: int
    corpus_extracts: int
    scrambled_extracts: int = 0
    garbled: int = 0
    garbled_seconds: int = 0
    batch_tokens: int = 8192
    learning_rate: float = 1e-3
    muon_learning_rate: float = 6e-3
    schedule: str = "trapezoid"
    final_fraction: float = 0.02


EACH_FORM_ONCE = tuple((form, 1) for form in ("definition", "short", "explanation", "how", "why", "example", "comparison"))

COPYING = Stage(epochs=4, mix=Mix(), corpus_tokens=250_000, first_corpus_tokens=1_000_000, corpus_extracts=250, final_fraction=1.0)
"""First: attention learns to copy from the context. Code words of 600 tokens ago are recalled after it, topics are not yet told apart."""

TOPICS = Stage(
    epochs=4, mix=Mix(follow_ups=2, readings=1, written_summaries=0, topic_extracts=100, recalls=200),
    corpus_tokens=60_000, first_corpus_tokens=60_000, corpus_extracts=200, muon_learning_rate=5e-3, schedule="linear", final_fraction=0.58,
)
"""Then: mostly topics, more often each. Questions find their topic after it, answers begin well and then ramble."""

ANSWERS = Stage(
    epochs=7,
    mix=Mix(
        forms=(("definition", 2), ("short", 1), ("explanation", 2), ("how", 2), ("why", 1), ("example", 1), ("comparison", 1)),
        unknowns=1, follow_ups=1, readings=0, written_summaries=0, topic_extracts=100, recalls=100,
    ),
    corpus_tokens=30_000, first_corpus_tokens=30_000, corpus_extracts=200, batch_tokens=6144,
    learning_rate=8e-4, muon_learning_rate=4e-3, schedule="linear",
)
"""Then: long answers twice as often, smaller batches. Trained questions are answered word by word after it, others one in three."""

PARAPHRASES = Stage(
    epochs=2,
    mix=Mix(
        forms=EACH_FORM_ONCE,
        unknowns=1, follow_ups=1, readings=0, written_summaries=0, topic_extracts=100, recalls=100,
    ),
    corpus_tokens=30_000, first_corpus_tokens=30_000, corpus_extracts=200, garbled=30, batch_tokens=6144,
    learning_rate=5e-4, muon_learning_rate=2e-3, schedule="linear",
)
"""Then: many garbled questions, so that it is the topic's name that decides."""

SECOND_TURNS = Stage(
    epochs=2,
    mix=Mix(
        forms=EACH_FORM_ONCE,
        unknowns=1, follow_ups=2, readings=2, topic_extracts=200, recalls=150,
    ),
    corpus_tokens=40_000, first_corpus_tokens=40_000, corpus_extracts=500, scrambled_extracts=600, garbled=15, garbled_seconds=10,
    batch_tokens=6144, learning_rate=6e-4, muon_learning_rate=3e-3, schedule="linear", final_fraction=0.8,
)
"""Then: garbled second questions, whose topic stands only in the talk so far, and scrambled texts, so that summaries copy."""

EVERYTHING = Stage(
    epochs=3,
    mix=Mix(
        forms=EACH_FORM_ONCE,
        unknowns=1, follow_ups=2, readings=1, topic_extracts=150, recalls=120,
    ),
    corpus_tokens=40_000, first_corpus_tokens=40_000, corpus_extracts=400, scrambled_extracts=200, garbled=20, garbled_seconds=8,
    batch_tokens=6144, learning_rate=5e-4, muon_learning_rate=2.4e-3, schedule="linear",
)
"""Then: everything at once. Answers are there after it; summaries are not, since written ones teach to invent."""

SUMMARIES = Stage(
    epochs=2,
    mix=Mix(
        forms=EACH_FORM_ONCE,
        unknowns=1, follow_ups=1, readings=1, written_summaries=0, topic_extracts=0, recalls=150,
    ),
    corpus_tokens=20_000, first_corpus_tokens=20_000, corpus_extracts=1500, scrambled_extracts=600, garbled=12, garbled_seconds=6,
    batch_tokens=6144, learning_rate=4e-4, muon_learning_rate=2e-3, schedule="linear",
)
"""Last: texts that nobody knows by heart to summarise in their own words, and enough of the rest not to lose it; the rate falls to nothing."""


@dataclass(frozen=True)
class ChatPlan:
    """Budget of one tuning run."""

    stages: tuple[Stage, ...] = (COPYING, TOPICS, ANSWERS, PARAPHRASES, SECOND_TURNS, EVERYTHING, SUMMARIES)
    length: int = 1024  # longer conversations are left out
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


def opening_only(row: Row) -> Row:
    """A row cut after the first tokens of its last answer; nothing before them is learned."""
    ids, labels = row
    start = max(i for i in range(1, len(labels)) if labels[i] != IGNORE and labels[i - 1] == IGNORE)
    end = start + OPENING_ROWS
    return ids[:end], [IGNORE] * start + labels[start:end]


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
    places = emphasised(wanted != IGNORE)
    return linear_cross_entropy(hidden.flatten(0, 1)[places], base.lm_head.weight, wanted.flatten()[places])


def emphasised(learned: Tensor) -> Tensor:
    """Flat places of the learned positions of [B, T] bool, those of each answer's opening `OPENING_WEIGHT` times."""
    before = torch.nn.functional.pad(learned, (1, 0))[:, :-1]
    begins = (learned & ~before).float()
    opening = torch.nn.functional.conv1d(torch.nn.functional.pad(begins, (OPENING_TOKENS - 1, 0))[:, None], begins.new_ones(1, 1, OPENING_TOKENS))[:, 0] > 0
    flat = learned.flatten().nonzero()[:, 0]
    first = (opening & learned).flatten().nonzero()[:, 0]
    return torch.cat([flat, first.repeat(OPENING_WEIGHT - 1)])


class _Corpus:
    """The pretraining text as windows and as paragraphs to summarise."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        documents = weighted_documents([d for d in read_corpus(folder) if not is_held_out(d.source)], SHARD_WEIGHTS, seed)
        self.stream = encode_documents(documents, tokenizer)
        self.paragraphs = sorted(set(paragraphs([d for d in documents if d.shard in EXTRACT_SHARDS])))

    def windows(self, stage: Stage, epoch: int, first: int, seed: int) -> list[Row]:
        tokens = stage.first_corpus_tokens if epoch == first else stage.corpus_tokens
        return [(w.tolist(), w.tolist()) for w in corpus_windows(self.stream, tokens, epoch, seed)]

    def extracts(self, stage: Stage, epoch: int, seed: int) -> list[list[Message]]:
        rng = np.random.default_rng((seed, epoch, 2))
        plain, mixed = stage.corpus_extracts, stage.scrambled_extracts
        chosen = [self.paragraphs[i] for i in rng.permutation(len(self.paragraphs))[: plain + mixed]]
        return [extract_talk(text, rng) for text in chosen[:plain]] + [extract_talk(scrambled(text, rng), rng) for text in chosen[plain:]]


def _schedule(
    tokenizer: PreTrainedTokenizerBase, plan: ChatPlan, stage: Stage, first: int, text: _Corpus | None, progress: Progress,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Every batch of a stage, in order: its epochs' conversations and corpus windows, mixed. Epochs are counted on from `first`."""
    data = load_instructions()
    out: list[tuple[np.ndarray, np.ndarray]] = []
    for epoch in range(first, first + stage.epochs):
        progress(0.0, f"encoding epoch {epoch + 1}")
        talks = conversations(data, epoch, plan.seed, stage.mix) + (text.extracts(stage, epoch, plan.seed) if text else [])
        rows = [r for r in (encode_talk(t, tokenizer) for t in talks) if len(r[0]) <= plan.length]
        strange = garbled_questions(data, epoch, plan.seed, stage.garbled) + garbled_seconds(data, epoch, plan.seed, stage.garbled_seconds)
        rows += [opening_only(encode_talk(t, tokenizer)) for t in strange]
        rows += text.windows(stage, epoch, first, plan.seed) if text else []
        out += batches(rows, stage.batch_tokens, int(tokenizer.pad_token_id), np.random.default_rng((plan.seed, epoch, 3)))
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
    text = _Corpus(corpus, tokenizer, plan.seed) if corpus is not None else None
    first, source = 0, backbone
    report = TrainingReport()
    for number, stage in enumerate(plan.stages, 1):
        last = number == len(plan.stages)
        result = output if last else work / f"stage{number}"
        if last or not (result / "model.safetensors").is_file():
            report = _train_stage(source, result, work / f"checkpoint{number}", plan, stage, first, text, tokenizer, progress, stop, sharded=last)
            if report.stopped is not None:
                break
        first, source = first + stage.epochs, result
    return report


def _train_stage(
    source: Path, result: Path, checkpoint: Path, plan: ChatPlan, stage: Stage, first: int, text: _Corpus | None,
    tokenizer: PreTrainedTokenizerBase, progress: Progress, stop: Stop | None, *, sharded: bool,
) -> TrainingReport:
    """Tune the model in `source` and write it to `result`: float32 between stages, bf16 shards at the end."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    use_short_row_attention(model)
    schedule = _schedule(tokenizer, plan, stage, first, text, progress)
    steps = len(schedule)
    log.info("%d steps, %.2f M tokens", steps, sum(ids.size for ids, _ in schedule) / 1e6)

    def batch_at(step: int, process: int, processes: int) -> tuple[Tensor, Tensor]:
        ids, labels = schedule[step]
        return torch.from_numpy(ids[process::processes]).to(model.device), torch.from_numpy(labels[process::processes]).to(model.device)

    report = train(
        model, _talk_loss, batch_at,
        TrainingPlan(steps=steps, learning_rate=stage.learning_rate, muon_learning_rate=stage.muon_learning_rate, weight_decay=0.02,
                     warmup_steps=min(40, steps // 10 + 1), schedule=stage.schedule, final_fraction=stage.final_fraction, seed=plan.seed),
        matrices=hidden_matrices(model), checkpoint=checkpoint, progress=progress, stop=stop,
    )
    if report.stopped is None and sharded:
        save_embedded(model, tokenizer, result)
    elif report.stopped is None:
        model.set_attn_implementation("sdpa")
        model.save_pretrained(result)
    return report


def save_embedded(model: Any, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Write a model as bf16 safetensors shards under 10 MB, with its tokenizer."""
    output.mkdir(parents=True, exist_ok=True)
    for old in output.glob("*.safetensors*"):
        old.unlink()
    model.set_attn_implementation("sdpa")
    model.bfloat16().save_pretrained(output, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(output)
