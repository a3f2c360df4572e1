"""The one training loop: accelerate, bf16 autocast, resume, Stop, progress. The caller brings loss and parameters."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from core.errors import CalibrationError, InvalidRequest
from core.progress import Progress, Stop, silent

log = logging.getLogger(__name__)

BatchAt = Callable[[int, int, int], Any]
"""`batch_at(step, process_index, num_processes)`: the batch is a pure function of the step, so resuming needs no state."""


@dataclass(frozen=True)
class TrainingPlan:
    """What one run does. Learning rates are peak values; `schedule` decays them to `final_fraction` of the peak."""

    steps: int
    learning_rate: float = 3e-3
    muon_learning_rate: float | None = None  # None: AdamW for every parameter
    weight_decay: float = 0.1
    warmup_steps: int = 50
    schedule: str = "cosine"  # cosine | linear | trapezoid (constant, then linear over the last 40 %)
    final_fraction: float = 0.02
    grad_clip: float = 1.0
    bf16: bool = True
    seed: int = 0
    save_every_s: float = 300.0
    evaluate_every: int = 0  # steps; 0: never
    patience: int = 0  # evaluations without improvement before an early stop; 0: never

    def __post_init__(self) -> None:
        rates = (self.learning_rate, self.muon_learning_rate or 0.0)
        if self.steps < 1:
            raise InvalidRequest(f"steps is {self.steps}; training needs at least 1.")
        if not all(math.isfinite(r) and r >= 0 for r in rates):
            raise InvalidRequest(f"learning rates are {rates}; they must be finite and not negative.")
        if self.schedule not in ("cosine", "linear", "trapezoid"):
            raise InvalidRequest(f"schedule is {self.schedule!r}; use cosine, linear or trapezoid.")

    def rate(self, step: int) -> float:
        """The learning rate's multiplier at `step`, in [0, 1]."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        if self.schedule == "cosine":
            shape = 0.5 * (1 + math.cos(math.pi * done))
        elif self.schedule == "linear":
            shape = 1 - done
        else:
            shape = min(1.0, (1 - done) / 0.4)
        return self.final_fraction + (1 - self.final_fraction) * shape


@dataclass
class TrainingReport:
    """What a run did. `losses` holds (step, training loss), `evaluations` (step, evaluation loss); both in nats."""

    steps: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    stopped: str | None = None  # None | "stop requested" | "no improvement"


def _optimizers(parameters: Sequence[nn.Parameter], plan: TrainingPlan, matrices: Sequence[nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices when asked for, AdamW for the rest; only matrices decay."""
    chosen = {id(p) for p in matrices} if plan.muon_learning_rate else set()
    rest = [p for p in parameters if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": 0.0 if chosen else plan.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if any(g["params"] for g in groups):
        optimizers.append(torch.optim.AdamW([g for g in groups if g["params"]], lr=plan.learning_rate, betas=(0.9, 0.95)))
    if chosen:
        optimizers.append(
            torch.optim.Muon([p for p in parameters if id(p) in chosen], lr=plan.muon_learning_rate or 0.0, weight_decay=plan.weight_decay)
        )
    return optimizers


def _save(accelerator: Accelerator, folder: Path, step: int, report: TrainingReport) -> None:
    """Write a checkpoint beside the old one, then swap: a kill in between leaves the old one whole."""
    fresh = folder.with_name(folder.name + ".new")
    if accelerator.is_main_process:
        shutil.rmtree(fresh, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(fresh))
    if accelerator.is_main_process:
        state = {"step": step, "seconds": report.seconds, "losses": report.losses, "evaluations": report.evaluations}
        (fresh / "progress.json").write_text(json.dumps(state))
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(fresh, folder)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def _resume(accelerator: Accelerator, folder: Path, report: TrainingReport) -> int:
    """Load the newest whole checkpoint; the step to go on from, 0 when there is none."""
    for candidate in (folder, folder.with_name(folder.name + ".old")):
        if (candidate / "progress.json").is_file():
            state = json.loads((candidate / "progress.json").read_text())
            accelerator.load_state(str(candidate))
            report.seconds = state["seconds"]
            report.losses = [(s, v) for s, v in state["losses"]]
            report.evaluations = [(s, v) for s, v in state["evaluations"]]
            log.info("resumed at step %d from %s", state["step"], candidate)
            return int(state["step"])
    return 0


def _worth_going_on(evaluations: Sequence[tuple[int, float]], patience: int) -> bool:
    """False when the last `patience` evaluations brought no new best."""
    values = [v for _, v in evaluations]
    return patience == 0 or len(values) <= patience or min(values[-patience:]) < min(values[:-patience])


def train(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batch_at: BatchAt,
    plan: TrainingPlan,
    *,
    parameters: Sequence[nn.Parameter] | None = None,
    matrices: Sequence[nn.Parameter] = (),
    evaluate: Callable[[nn.Module], float] | None = None,
    checkpoint: Path | None = None,
    progress: Progress = silent,
    stop: Stop | None = None,
) -> TrainingReport:
    """Train `model` in place.

    Args:
        model: left in training mode off (`eval()`) when done.
        loss: returns the scalar loss of one batch; called under autocast.
        batch_at: see `BatchAt`; tensors are moved to the device by the caller's loss or lie there already.
        plan: steps, rates, schedule.
        parameters: what is trained; all that require a gradient when None.
        matrices: the hidden 2-D weights that Muon takes when `plan.muon_learning_rate` is set.
        evaluate: called every `plan.evaluate_every` steps; its loss drives the early stop.
        checkpoint: folder to save to and resume from; None keeps nothing.
        progress: fraction, "step 3/10 loss 2.100 ..." about once a second.
        stop: polled before every step; on request the state is saved and the report says so.

    Raises:
        CalibrationError: the loss is not finite.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(plan.seed)
    chosen = [p for p in (parameters if parameters is not None else model.parameters()) if p.requires_grad]
    optimizers = _optimizers(chosen, plan, matrices)
    prepared, *prepared_optimizers = accelerator.prepare(model, *optimizers)
    report = TrainingReport()
    first = _resume(accelerator, checkpoint, report) if checkpoint else 0
    prepared.train()
    began, before, saved, shown = time.perf_counter(), report.seconds, time.monotonic(), 0.0
    step = first
    for step in range(first, plan.steps):
        if stop is not None and stop.requested:
            report.stopped = "stop requested"
            break
        for optimizer in prepared_optimizers:
            peak = plan.muon_learning_rate if isinstance(optimizer.optimizer, torch.optim.Muon) else plan.learning_rate
            for group in optimizer.param_groups:
                group["lr"] = peak * plan.rate(step)
        with torch.autocast(accelerator.device.type, dtype=torch.bfloat16, enabled=plan.bf16):
            value = loss(prepared, batch_at(step, accelerator.process_index, accelerator.num_processes))
        if not torch.isfinite(value):
            raise CalibrationError(f"The loss became {float(value)} at step {step}. Lower the learning rate or check the data for empty rows.")
        accelerator.backward(value)
        if plan.grad_clip:
            accelerator.clip_grad_norm_(chosen, plan.grad_clip)
        for optimizer in prepared_optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        report.losses.append((step, float(value.detach())))
        report.seconds = before + time.perf_counter() - began
        if plan.evaluate_every and evaluate and (step + 1) % plan.evaluate_every == 0:
            prepared.eval()
            report.evaluations.append((step + 1, evaluate(model)))
            prepared.train()
            if not _worth_going_on(report.evaluations, plan.patience):
                report.stopped = "no improvement"
                step += 1
                break
        if time.monotonic() - shown > 1:
            left = (time.perf_counter() - began) / (step - first + 1) * (plan.steps - step - 1)
            progress((step + 1) / plan.steps, f"step {step + 1}/{plan.steps} loss {report.losses[-1][1]:.3f} {left:.0f} s left")
            shown = time.monotonic()
        if checkpoint and time.monotonic() - saved > plan.save_every_s:
            _save(accelerator, checkpoint, step + 1, report)
            saved = time.monotonic()
    else:
        step = plan.steps
    report.steps = step
    if checkpoint:
        _save(accelerator, checkpoint, step, report)
    accelerator.wait_for_everyone()
    model.eval()
    accelerator.free_memory()
    return report
