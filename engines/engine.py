"""An engine: a bundle with techniques applied once, at construction, and never changed again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from core.bundle import Bundle, ModelInfo, StorageWatch, storage_bytes, tensors_of, weight_bytes
from core.compatibility import ordered
from core.errors import InvalidRequest
from core.memory import peak_resident_bytes, reset_peak
from core.prepared_cache import cached_prepare
from core.progress import Progress, Stop, silent
from core.technique import Applied, Label, Report, Technique
from engines.generation import Finished, Prefilled, TokenDecoded, generate
from engines.methods import method_name
from engines.metrics import GIB, ChatMetrics, Timing, reservation_metrics, timing_metrics
from engines.native.release import forget_originals, move_what_stays
from engines.prompting import Message, Prompt, build_prompt, check_context
from engines.sampling import Sampling
from engines.text_stream import TextStream


@dataclass(frozen=True)
class Answer:
    """One answer of one engine. `gaps_s` are the times between tokens, for the latency chart."""

    method: str
    text: str
    token_ids: tuple[int, ...]
    prompt: Prompt
    gaps_s: tuple[float, ...]
    model: ModelInfo
    metrics: ChatMetrics
    reports: tuple[Report, ...]


class Engine:
    """Runs one bundle, one answer at a time; whoever comes second waits."""

    def __init__(self, bundle: Bundle, applied: Sequence[Applied] = (), techniques: Sequence[Technique] = ()) -> None:
        self.bundle = bundle
        self.techniques = tuple(techniques)
        self.method = method_name(self.techniques)
        self.reports = tuple(a.report for a in applied)
        self._applied = tuple(applied)
        self._busy = threading.Lock()
        self.weights = weight_bytes(bundle, (a.edits for a in applied), (m for a in applied for m in a.packed))

    def storages(self) -> dict[int, int]:
        """Bytes by address of every weight this engine keeps alive, originals for undo included."""
        kept = [m for a in self._applied for m in a.edits.replaced]
        return storage_bytes(tensors_of([self.bundle.model, *kept]))

    def warm_up(self) -> None:
        """Run a short prompt and a few steps, so that the first answer does not pay for one-time work."""
        try:
            ids = build_prompt(self.bundle, [{"role": "user", "content": "Hello."}]).ids[:16]
        except InvalidRequest:  # a template that wants another conversation: the model is warmed up all the same
            ids = (self.bundle.tokenizer.bos_token_id or 0,) * 8
        for _ in generate(self.bundle, ids, Sampling(max_new_tokens=3, ignore_eos=True), Stop()):
            pass

    def answer(self, messages: Sequence[Message], sampling: Sampling, stop: Stop, on_text: Callable[[str], None], *, reuse: bool = False) -> Answer:
        """Answer a conversation that ends with the user's turn.

        Args:
            on_text: called with each piece of text as it comes, in this thread.
            stop: polled at every token and prefill chunk.
            reuse: begin with what an earlier prompt left in the KV memory, where the cache keeps that; measurements leave it off.

        Raises:
            PromptTooLong: with the numbers.
            InvalidRequest: the conversation cannot be rendered.
        """
        with self._busy:
            return self._answer(messages, sampling, stop, on_text, reuse)

    def _answer(self, messages: Sequence[Message], sampling: Sampling, stop: Stop, on_text: Callable[[str], None], reuse: bool) -> Answer:
        peak_counts = reset_peak()
        began = time.perf_counter()
        prompt = build_prompt(self.bundle, messages)
        check_context(self.bundle, len(prompt.ids), sampling.max_new_tokens)
        stream, pieces, tokens, times = TextStream(self.bundle.tokenizer), [], [], []
        prefilled, finished = None, Finished("stopped", None, None)
        for event in generate(self.bundle, prompt.ids, sampling, stop, reuse=reuse):
            if isinstance(event, TokenDecoded):
                tokens.append(event.token)
                times.append(event.at_s)
                pieces.append(stream.push(event.token))
                on_text(pieces[-1])
            elif isinstance(event, Prefilled):
                prefilled = event
            else:
                finished = event
        pieces.append(stream.flush())
        on_text(pieces[-1])
        text = "".join(pieces)
        timing = None
        if prefilled is not None:
            timing = Timing(began, prefilled.began_s, prefilled.ended_s, tuple(times))
        reused = prefilled.reused_tokens if prefilled is not None else None
        metrics = replace(self._metrics(prompt, text, timing, finished, reused or 0), kv_reused_tokens=reused)
        metrics = replace(metrics, output_tokens=len(tokens), peak_rss_bytes=peak_resident_bytes() if peak_counts else None)
        return Answer(self.method, text, tuple(tokens), prompt, timing.gaps_s if timing else (), self.bundle.info, metrics, self.reports)

    def _metrics(self, prompt: Prompt, text: str, timing: Timing | None, finished: Finished, reused_tokens: int) -> ChatMetrics:
        metrics = ChatMetrics(
            prompt_tokens=len(prompt.ids),
            prompt_tokens_unfiltered=prompt.unfiltered_tokens,
            output_chars=len(text),
            weights_in_use_bytes=self.weights.in_use,
            weights_kept_for_undo_bytes=self.weights.kept_for_undo,
            weights_packed_bytes=self.weights.packed,
            kv_in_use_bytes=finished.kv_in_use_bytes,
            kv_committed_bytes=finished.kv_committed_bytes,
            kv_reserved_bytes=finished.kv_reserved_bytes,
            finish_reason=finished.reason,
            times_comparable=True,
            dtype=self.bundle.info.dtype,
            **reservation_metrics(finished.reservation),
        )
        if timing is None:
            return metrics
        times: dict[str, Any] = dict(timing_metrics(timing, len(prompt.ids) - reused_tokens, len(text)))
        metrics = replace(metrics, **times)
        if metrics.chars_s is None or finished.kv_in_use_bytes is None:
            return metrics
        return replace(metrics, chars_s_per_gib=metrics.chars_s * GIB / (self.weights.in_use + finished.kv_in_use_bytes))


def baseline_engine(bundle: Bundle) -> Engine:
    """The unmodified transformers model: sdpa attention, DynamicCache."""
    return Engine(bundle)


def fused_engine(base: Bundle, techniques: Sequence[Technique], progress: Progress = silent, calibration: Sequence[str] | None = None, *, in_place: bool = False) -> Engine:
    """A copy of `base` over the same tensors with techniques applied; `base` itself is left alone.

    Where a technique drops originals, the copy holds none of them, nor any for undo. They leave memory when nobody else holds them.

    Args:
        in_place: change `base` itself, which is given away: nobody else may use it. Then dropped originals leave memory now.
        calibration: texts that techniques calibrate on; the project's own when None.

    Raises:
        IncompatibleTechniques, UnsupportedModel: before anything is changed.
    """
    chain = ordered(techniques)
    bundle = base if in_place else base.clone()
    drops = any(t.drops_originals for t in chain)
    if drops and in_place:
        move_what_stays(bundle.model)
    watch = StorageWatch(tensors_of([bundle.model])) if drops else None
    applied: list[Applied] = []
    try:
        for place, technique in enumerate(chain):
            progress(place / len(chain), f"applying {technique.title}")
            technique.check(bundle)
            applied.append(technique.apply(bundle, cached_prepare(technique, bundle, calibration, progress)))
    except BaseException:
        for done in reversed(applied):
            done.undo()
        raise
    if bundle.decoder is not None:
        for done in applied[:-1]:
            done.report = done.report.executed("executed: decode steps run it in the native runtime") if done.report.label is not Label.EXECUTED else done.report
    if watch is not None and bundle.decoder is not None:
        forget_originals(applied, bundle, watch)
    progress(1.0, "ready")
    return Engine(bundle, applied, chain)
