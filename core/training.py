"""The one training loop: accelerate, bf16 autocast, resume, Stop, progress. The caller brings loss and parameters."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from core.cpu_features import multiplies_bf16
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
    bf16: bool = True  # autocast, where the device multiplies bfloat16
    seed: int = 0
    save_every_s: float = 300.0
    evaluate_every: int = 0  # steps; 0: never
    patience: int = 0  # evaluations without improvement before an early stop; 0: never

    def __post_init__(self) -> None:
        rates = (self.learning_rate, self.muon_learning_rate or 0.0)
        if not isinstance(self.steps, int) or self.steps < 1:
            raise InvalidRequest(f"steps is {self.steps}; training needs at least 1, a whole number.")
        for name in ("warmup_steps", "weight_decay", "grad_clip", "evaluate_every", "patience", "final_fraction"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InvalidRequest(f"{name} is {getattr(self, name)}; it must be finite and not negative.")
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


def _identity(plan: TrainingPlan, model: nn.Module) -> str:
    """A name for a run: its plan and the weights it starts from. Another run's checkpoint is not resumed."""
    digest = hashlib.sha256(json.dumps(asdict(plan), sort_keys=True).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {float(parameter.detach().double().sum()):.9e}".encode())
    return digest.hexdigest()[:16]


def _save(accelerator: Accelerator, folder: Path, step: int, report: TrainingReport, identity: str) -> None:
    """Write a checkpoint beside the old one, then swap: a kill in between leaves the old one whole."""
    fresh = folder.with_name(folder.name + ".new")
    if accelerator.is_main_process:
        shutil.rmtree(fresh, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(fresh))
    if accelerator.is_main_process:
        state = {"identity": identity, "step": step, "seconds": report.seconds, "losses": report.losses, "evaluations": report.evaluations}
        (fresh / "progress.json").write_text(json.dumps(state))
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(fresh, folder)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def _resume(accelerator: Accelerator, folder: Path, report: TrainingReport, identity: str) -> int:
    """Load the newest whole checkpoint of this run; the step to go on from, 0 when there is none.

    Raises:
        InvalidRequest: the checkpoint is of another run.
    """
    for candidate in (folder, folder.with_name(folder.name + ".old")):
        if (candidate / "progress.json").is_file():
            state = json.loads((candidate / "progress.json").read_text())
            if state.get("identity") != identity:
                raise InvalidRequest(f"{candidate} is of a run with another plan or other starting weights. Delete it, or name another folder.")
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


class _Loop:
    """One run: the accelerator's objects, the report, and when to save, show and stop."""

    def __init__(self, model: nn.Module, plan: TrainingPlan, chosen: Sequence[nn.Parameter], matrices: Sequence[nn.Parameter]) -> None:
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        torch.manual_seed(plan.seed)
        self.identity = _identity(plan, model)
        self.plan, self.chosen = plan, chosen
        self.model, *self.optimizers = self.accelerator.prepare(model, *_optimizers(chosen, plan, matrices))
        self.report = TrainingReport()
        self._saved, self._shown = time.monotonic(), 0.0

    def step(self, step: int, loss: Callable[[nn.Module, Any], Tensor], batch: Any) -> None:
        """Forward, backward, update."""
        for optimizer in self.optimizers:
            is_muon = isinstance(optimizer.optimizer, torch.optim.Muon)
            peak = (self.plan.muon_learning_rate or 0.0) if is_muon else self.plan.learning_rate
            for group in optimizer.param_groups:
                group["lr"] = peak * self.plan.rate(step)
        with torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16, enabled=self.plan.bf16 and multiplies_bf16(self.accelerator.device.type)):
            value = loss(self.model, batch)
        if not torch.isfinite(value):
            raise CalibrationError(f"The loss became {float(value.detach())} at step {step}. Lower the learning rate or check the data for empty rows.")
        self.accelerator.backward(value)
        if self.plan.grad_clip:
            self.accelerator.clip_grad_norm_(self.chosen, self.plan.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.report.losses.append((step, float(value.detach())))

    def evaluate(self, done: int, evaluate: Callable[[nn.Module], float] | None) -> bool:
        """Evaluate when it is time to; False when there is nothing to be gained from going on."""
        if not (self.plan.evaluate_every and evaluate and done % self.plan.evaluate_every == 0):
            return True
        self.model.eval()
        self.report.evaluations.append((done, evaluate(self.accelerator.unwrap_model(self.model))))
        self.model.train()
        return _worth_going_on(self.report.evaluations, self.plan.patience)

    def show(self, done: int, seconds_a_step: float, progress: Progress) -> None:
        """Report progress about once a second."""
        if time.monotonic() - self._shown > 1 or done == self.plan.steps:
            left = seconds_a_step * (self.plan.steps - done)
            progress(done / self.plan.steps, f"step {done}/{self.plan.steps} loss {self.report.losses[-1][1]:.3f} {left:.0f} s left")
            self._shown = time.monotonic()

    def save_when_due(self, done: int, checkpoint: Path | None) -> None:
        """Save every `plan.save_every_s`."""
        if checkpoint and time.monotonic() - self._saved > self.plan.save_every_s:
            _save(self.accelerator, checkpoint, done, self.report, self.identity)
            self._saved = time.monotonic()

    def close(self, checkpoint: Path | None) -> None:
        """Save the end and let go of the accelerator's objects."""
        if checkpoint:
            _save(self.accelerator, checkpoint, self.report.steps, self.report, self.identity)
        self.accelerator.wait_for_everyone()
        self.model.eval()
        self.accelerator.free_memory()


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
        model: left in evaluation mode when done.
        loss: returns the scalar loss of one batch; called under autocast.
        batch_at: see `BatchAt`; the caller puts its tensors on the model's device.
        plan: steps, rates, schedule.
        parameters: what is trained; all that require a gradient when None.
        matrices: the hidden 2-D weights that Muon takes when `plan.muon_learning_rate` is set.
        evaluate: called every `plan.evaluate_every` steps; its loss drives the early stop.
        checkpoint: folder to save to and resume from; None keeps nothing.
        progress: fraction, "step 3/10 loss 2.100 ..." about once a second.
        stop: polled before every step; on request the state is saved and the report says so.

    Raises:
        CalibrationError: the loss is not finite.
        InvalidRequest: the checkpoint folder holds another run.
    """
    chosen = [p for p in (parameters if parameters is not None else model.parameters()) if p.requires_grad]
    loop = _Loop(model, plan, chosen, matrices)
    report, accelerator = loop.report, loop.accelerator
    first = _resume(accelerator, checkpoint, report, loop.identity) if checkpoint else 0
    loop.model.train()
    began, before = time.perf_counter(), report.seconds
    report.steps = first
    for step in range(first, plan.steps):
        if stop is not None and stop.requested:
            report.stopped = "stop requested"
            break
        loop.step(step, loss, batch_at(step, accelerator.process_index, accelerator.num_processes))
        report.steps = step + 1
        report.seconds = before + time.perf_counter() - began
        if not loop.evaluate(step + 1, evaluate):
            report.stopped = "no improvement"
            break
        loop.show(step + 1, (time.perf_counter() - began) / (step + 1 - first), progress)
        loop.save_when_due(step + 1, checkpoint)
    loop.close(checkpoint)
    return report
