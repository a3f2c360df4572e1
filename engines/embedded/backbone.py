"""Pretraining of the backbone that the embedded chat model, classifier and reader are tuned from."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from core.datasets import Document, TokenStream, is_held_out, read_corpus
from core.losses import linear_cross_entropy
from core.progress import Progress, Stop, silent
from core.training import TrainingPlan, TrainingReport, train
from engines.embedded.tokenizer import train_tokenizer

log = logging.getLogger(__name__)

# How often a pass sees each shard: what the chat model talks about counts double or more, the rest is thinned.
SHARD_WEIGHTS = {"science": 2.0, "climate": 3.0, "ai_ml": 1.0, "computing": 0.5, "nlp_abstracts": 0.5, "general": 0.5}


@dataclass(frozen=True)
class BackbonePlan:
    """Shape and budget of one pretraining run."""

    vocab_size: int = 8192
    hidden_size: int = 320
    intermediate_size: int = 896
    num_hidden_layers: int = 8
    num_attention_heads: int = 10
    max_position_embeddings: int = 2048
    tokens: int = 7_500_000
    batch_tokens: int = 8192
    short_length: int = 256
    long_length: int = 1024
    long_fraction: float = 0.15  # the last steps run at `long_length`
    learning_rate: float = 2e-3
    muon_learning_rate: float = 0.01
    seed: int = 0
    shard_weights: dict[str, float] = field(default_factory=lambda: dict(SHARD_WEIGHTS))

    @property
    def steps(self) -> int:
        """Optimizer steps that `tokens` make."""
        return max(1, self.tokens // self.batch_tokens)

    def length_at(self, step: int) -> int:
        """Window length of a step: short first, long for the last share."""
        return self.long_length if step >= self.steps * (1 - self.long_fraction) else self.short_length


def backbone_config(plan: BackbonePlan, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """Llama architecture with full (ungrouped) attention heads and tied embeddings."""
    return LlamaConfig(
        vocab_size=plan.vocab_size,
        hidden_size=plan.hidden_size,
        intermediate_size=plan.intermediate_size,
        num_hidden_layers=plan.num_hidden_layers,
        num_attention_heads=plan.num_attention_heads,
        num_key_value_heads=plan.num_attention_heads,
        max_position_embeddings=plan.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def weighted_documents(documents: list[Document], weights: dict[str, float], seed: int) -> list[Document]:
    """One shuffled pass in which a shard of weight 2 comes twice and one of weight 0.5 gives every second document."""
    rng = np.random.default_rng(seed)
    chosen: list[Document] = []
    for document in documents:
        weight = weights.get(document.shard, 1.0)
        chosen += [document] * (int(weight) + int(rng.random() < weight % 1))
    rng.shuffle(chosen)  # type: ignore[arg-type]
    return chosen


def encode_documents(documents: list[Document], tokenizer: PreTrainedTokenizerBase) -> TokenStream:
    """All documents in a row, each opened by BOS."""
    ids: list[np.ndarray] = []
    for start in range(0, len(documents), 256):
        texts = [d.text for d in documents[start : start + 256]]
        for row in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            ids.append(np.array([tokenizer.bos_token_id, *row], dtype=np.uint16))
    return TokenStream(np.concatenate(ids))


def causal_lm_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean next-token cross-entropy of [B, T] token ids, in nats, without holding the logits."""
    base: Any = getattr(model, "module", model)
    hidden = base.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
    return linear_cross_entropy(hidden.reshape(-1, hidden.shape[-1]), base.lm_head.weight, tokens[:, 1:].reshape(-1))


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The 2-D weights between embedding and head: what Muon may take."""
    return [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "lm_head" not in name]


def train_backbone(
    corpus: Path,
    output: Path,
    plan: BackbonePlan,
    *,
    progress: Progress = silent,
    stop: Stop | None = None,
) -> TrainingReport:
    """Train tokenizer and backbone on a corpus folder and save them to `output`; resumes from `output/checkpoint`.

    Documents of the fixed held-out share (`is_held_out`) are never trained on.

    Raises:
        CalibrationError: the corpus folder holds no shard, or too little text.
    """
    output.mkdir(parents=True, exist_ok=True)
    documents = [d for d in read_corpus(corpus) if not is_held_out(d.source)]
    if (output / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(output)
    else:
        progress(0.0, "training the tokenizer")
        tokenizer = train_tokenizer((d.text for d in documents), plan.vocab_size)
        tokenizer.save_pretrained(output)
    progress(0.0, "encoding the corpus")
    stream = encode_documents(weighted_documents(documents, plan.shard_weights, plan.seed), tokenizer)
    log.info("%d documents, %.2f M tokens a pass, %d steps", len(documents), len(stream.tokens) / 1e6, plan.steps)
    torch.manual_seed(plan.seed)
    model = LlamaForCausalLM(backbone_config(plan, tokenizer))
    (output / "plan.json").write_text(json.dumps(asdict(plan), indent=1))

    def batch_at(step: int, process: int, processes: int) -> Tensor:
        length = plan.length_at(step)
        rows = max(1, plan.batch_tokens // length)
        mine = rows // processes
        return stream.batch(step, rows, length, plan.seed)[process * mine : (process + 1) * mine].to(model.device)

    report = train(
        model,
        causal_lm_loss,
        batch_at,
        TrainingPlan(
            steps=plan.steps,
            learning_rate=plan.learning_rate,
            muon_learning_rate=plan.muon_learning_rate,
            weight_decay=0.05,
            warmup_steps=min(60, plan.steps // 10 + 1),
            schedule="trapezoid",
            seed=plan.seed,
        ),
        matrices=hidden_matrices(model),
        checkpoint=output / "checkpoint",
        progress=progress,
        stop=stop,
    )
    if report.stopped is None:
        model.bfloat16().save_pretrained(output)
    return report
