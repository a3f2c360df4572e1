"""The embedded chat model's card, recomputed: every figure on questions and texts that were kept out of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.bundle import Bundle
from core.datasets import is_held_out, read_corpus
from core.evaluation import wilson_interval
from core.progress import Progress, Stop, silent
from engines.compare.queries import built_in_queries
from engines.embedded.instructions import (
    HELD_OUT_PERCENT,
    InstructionSet,
    answer_of,
    code_word_talk,
    code_words,
    load_instructions,
    reading_prompt,
    summary_prompt,
)
from engines.engine import Engine
from engines.export import plain
from engines.prompting import Message
from engines.sampling import Sampling
from engines.text_quality import keyword_recall, rouge_l

_DECLINES = ("do not know", "don't know", "cannot answer", "can't answer", "not something i know", "outside my topics", "outside what i", "no idea")


def is_decline(answer: str) -> bool:
    """True when an answer says that it does not know."""
    return any(mark in answer.lower() for mark in _DECLINES)


def _share(hits: Sequence[bool]) -> dict[str, Any]:
    low, high = wilson_interval(sum(hits), len(hits))
    return {"share": sum(hits) / len(hits), "interval": [low, high], "n": len(hits)}


class ChatEvaluation:
    """Runs the question sets through one engine, greedily."""

    def __init__(self, engine: Engine, data: InstructionSet | None = None) -> None:
        self.engine, self.data = engine, data or load_instructions()

    def ask(self, *turns: str, history: Sequence[Message] = (), tokens: int = 160) -> str:
        """The answer to the last of `turns`; answers to the turns before are generated too."""
        messages = list(history)
        answer = ""
        for turn in turns:
            messages.append({"role": "user", "content": turn})
            answer = self.engine.answer(messages, Sampling(max_new_tokens=tokens), Stop(), lambda _: None).text
            messages.append({"role": "assistant", "content": answer})
        return answer

    def topics(self, limit: int | None, progress: Progress) -> dict[str, Any]:
        """Held-out paraphrases of trained topics: keyword recall and the share wrongly declined."""
        chosen = self.data.topics[:: max(1, len(self.data.topics) // limit)] if limit else self.data.topics
        recalls, declined, samples = [], [], []
        for place, topic in enumerate(chosen):
            progress(place / len(chosen), f"topics {place}/{len(chosen)}")
            held = topic["held_out"]
            reference = answer_of(topic, held["form"]).lower()
            wanted = [k for k in topic["keywords"] if k.lower() in reference] or topic["keywords"]
            answer = self.ask(held["question"])
            recalls.append(keyword_recall(answer, wanted))
            declined.append(is_decline(answer))
            samples.append({"question": held["question"], "answer": answer, "recall": recalls[-1]})
        return {"n": len(chosen), "keyword_recall": float(np.mean(recalls)), "declined": _share(declined), "samples": samples}

    def follow_ups(self, progress: Progress) -> dict[str, Any]:
        """Two-turn talks whose second question does not name the topic: keyword recall of the second answer."""
        recalls, samples = [], []
        for place, row in enumerate(self.data.evaluation_follow_ups):
            progress(place / len(self.data.evaluation_follow_ups), f"follow-ups {place}")
            answer = self.ask(*row["turns"])
            recalls.append(keyword_recall(answer, row["keywords"]))
            samples.append({"turns": row["turns"], "answer": answer, "recall": recalls[-1]})
        return {"n": len(recalls), "keyword_recall": float(np.mean(recalls)), "samples": samples}

    def unknown(self, progress: Progress) -> dict[str, Any]:
        """Questions outside the topics: the share declined."""
        hits, samples = [], []
        for place, question in enumerate(self.data.evaluation_unknown):
            progress(place / len(self.data.evaluation_unknown), f"unknown {place}")
            answer = self.ask(question, tokens=60)
            hits.append(is_decline(answer))
            samples.append({"question": question, "answer": answer})
        return {"declined": _share(hits), "samples": samples}

    def recall(self, lengths: Sequence[int], progress: Progress, each: int = 20) -> dict[str, Any]:
        """A code word given, filler text of about so many tokens, and the question for it."""
        rng = np.random.default_rng(7)
        words, out = code_words(held_out=True), {}
        for length in lengths:
            progress(0.0, f"recall at {length} tokens")
            hits = []
            for place in range(each):
                word, fillers, count = words[place % len(words)], [], 0
                while count < length - 60:
                    fillers.append(answer_of(self.data.topics[int(rng.integers(len(self.data.topics)))], "explanation"))
                    count = len(self.engine.bundle.tokenizer(" ".join(fillers), verbose=False)["input_ids"])
                talk = code_word_talk(word, fillers, rng)
                answer = self.ask(talk[-2]["content"], history=talk[:-2], tokens=24)
                hits.append(word in answer.lower())
            out[str(length)] = _share(hits)
        return out

    def reading(self, progress: Progress) -> dict[str, Any]:
        """Questions about held-out texts: the answer's words are in what the model says."""
        hits = []
        for row in (r for r in self.data.reading if is_held_out(r["id"], HELD_OUT_PERCENT)):
            progress(0.0, "reading")
            hits += [q["answer"].lower().rstrip(".") in self.ask(reading_prompt(row["text"], q["question"]), tokens=24).lower() for q in row["questions"]]
        return _share(hits)

    def summaries(self, progress: Progress) -> dict[str, Any]:
        """Held-out texts: length, key terms kept, ROUGE-L against the written summary."""
        ratios, kept, rouge, samples = [], [], [], []
        for row in (r for r in self.data.summaries if is_held_out(r["id"], HELD_OUT_PERCENT)):
            progress(0.0, "summaries")
            answer = self.ask(summary_prompt(row["text"]), tokens=140)
            ratios.append(len(answer.split()) / len(row["text"].split()))
            kept.append(keyword_recall(answer, row["key_terms"]))
            rouge.append(rouge_l(answer, row["summary"]))
            samples.append({"text": row["text"], "answer": answer})
        return {
            "n": len(ratios), "length_ratio": float(np.mean(ratios)), "shorter_than_half": _share([r < 0.5 for r in ratios]),
            "key_terms_kept": float(np.mean(kept)), "rouge_l": float(np.mean(rouge)), "samples": samples,
        }

    def built_in(self, progress: Progress) -> dict[str, Any]:
        """The queries that every comparison starts from: answers to be read, and the share of expected words in them."""
        samples = []
        for query in built_in_queries():
            progress(0.0, "built-in queries")
            answer = self.ask(query.question, tokens=160)
            samples.append({"kind": query.kind, "question": query.question, "answer": answer, "recall": keyword_recall(answer, query.keywords)})
        return {"n": len(samples), "keyword_recall": float(np.mean([s["recall"] for s in samples])), "samples": samples}


@torch.inference_mode()
def bits_per_byte_by_position(bundle: Bundle, texts: Sequence[str], length: int = 1024, edges: Sequence[int] = (64, 256, 512, 1024)) -> dict[str, Any]:
    """Bits per byte of texts under the unmodified model, in all and by position in the context.

    The dense model scores the same in one prefill as token by token, so a prefill is used.
    """
    nll, spans = np.zeros(len(edges)), np.zeros(len(edges))
    total_bytes = 0
    for text in texts:
        ids = bundle.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: length - 1]
        if len(ids) < 2:
            continue
        row = torch.tensor([[bundle.tokenizer.bos_token_id, *ids]], device=bundle.device)
        logits = bundle.model(input_ids=row, use_cache=False).logits[0, :-1].float()
        losses = -logits.log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
        place = np.digitize(np.arange(len(ids)), edges)
        place = np.minimum(place, len(edges) - 1)
        np.add.at(nll, place, losses.numpy())
        np.add.at(spans, place, 1)
        total_bytes += len(str(bundle.tokenizer.decode(ids)).encode())
    tokens = int(spans.sum())
    names = [f"to {e}" for e in edges]
    return {
        "bits_per_byte": float(nll.sum() / math.log(2) / total_bytes), "tokens": tokens, "bytes": total_bytes,
        "nats_per_token_by_position": {n: float(a / b) if b else None for n, a, b in zip(names, nll, spans, strict=True)},
    }


def corpus_texts(shared: Path) -> dict[str, list[str]]:
    """Held-out texts of the shared data that are there: corpus documents, WikiText-2, TinyStories."""
    out: dict[str, list[str]] = {}
    if (shared / "corpus").is_dir():
        out["corpus"] = [d.text for d in read_corpus(shared / "corpus") if is_held_out(d.source)][:200]
    if (shared / "wikitext2" / "validation.txt").is_file():
        paragraphs = (shared / "wikitext2" / "validation.txt").read_text().split("\n")
        out["wikitext2"] = [p.strip() for p in paragraphs if len(p) > 400][:200]
    if (shared / "tinystories" / "tinystories_700.json").is_file():
        import json

        out["tinystories"] = json.loads((shared / "tinystories" / "tinystories_700.json").read_text())[:100]
    return out


def evaluate_chat(engine: Engine, shared: Path | None, *, limit: int | None = None, progress: Progress = silent) -> dict[str, Any]:
    """Everything the model card reports. `limit` bounds the topic questions for a quick look."""
    evaluation = ChatEvaluation(engine)
    figures: dict[str, Any] = {
        "topics": evaluation.topics(limit, progress),
        "follow_ups": evaluation.follow_ups(progress),
        "unknown": evaluation.unknown(progress),
        "recall_from_context": evaluation.recall((100, 300, 600, 1000), progress),
        "reading": evaluation.reading(progress),
        "summaries": evaluation.summaries(progress),
        "built_in": evaluation.built_in(progress),
    }
    if shared is not None:
        figures["bits_per_byte"] = {name: bits_per_byte_by_position(engine.bundle, texts) for name, texts in corpus_texts(shared).items()}
    return dict(plain(figures))
