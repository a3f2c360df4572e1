"""The training loop: it learns, resumes to the same weights, stops when asked, and says what is wrong."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.errors import CalibrationError, InvalidRequest
from core.progress import Stop
from core.training import TrainingPlan, TrainingReport, train

TRUTH = torch.tensor([1.0, -2.0, 3.0, 0.5])
Batch = tuple[Tensor, Tensor]


class Killed(BaseException):
    """The process ends here: nothing of the loop may catch it."""


def toy() -> nn.Sequential:
    """Dropout makes the result depend on the random state, so resuming must restore it."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 1))


def batch_at(step: int, process: int = 0, processes: int = 1) -> Batch:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(step))
    return x, (x @ TRUTH)[:, None]


def squared(model: nn.Module, batch: Batch) -> Tensor:
    return ((model(batch[0]) - batch[1]) ** 2).mean()


def killed_at(step: int) -> Callable[[int, int, int], Batch]:
    def batches(now: int, process: int, processes: int) -> Batch:
        if now == step:
            raise Killed
        return batch_at(now)

    return batches


def plan(**changes: Any) -> TrainingPlan:
    values: dict[str, Any] = {"steps": 20, "learning_rate": 0.02, "warmup_steps": 2, "bf16": False, "save_every_s": 0.0}
    return TrainingPlan(**{**values, **changes})


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# Learning.


@pytest.mark.parametrize("bf16", [False, True])
def test_loss_falls(bf16: bool) -> None:
    model = toy()
    report = train(model, squared, batch_at, plan(steps=60, bf16=bf16))
    losses = [value for _, value in report.losses]
    assert report.steps == 60 and [step for step, _ in report.losses] == list(range(60))
    assert sum(losses[-5:]) < 0.25 * sum(losses[:5])
    assert report.stopped is None and report.seconds > 0 and not model.training


def test_the_same_plan_gives_the_same_weights_and_another_seed_other_ones() -> None:
    models = [toy() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        train(model, squared, batch_at, plan(seed=seed))
    assert same_weights(models[0], models[1]) and not same_weights(models[0], models[2])


def test_only_the_parameters_given_are_trained() -> None:
    model, before = toy(), toy()
    train(model, squared, batch_at, plan(), parameters=list(model[3].parameters()))
    assert same_weights(model[0], before[0]) and not same_weights(model[3], before[3])


def test_parameters_that_need_no_gradient_stay() -> None:
    model, before = toy(), toy()
    model[0].requires_grad_(False)
    train(model, squared, batch_at, plan())
    assert same_weights(model[0], before[0]) and not same_weights(model[3], before[3])


def test_only_matrices_decay() -> None:
    model, before = toy(), toy()
    train(model, lambda model, batch: 0.0 * squared(model, batch), batch_at, plan(steps=1, warmup_steps=0, weight_decay=0.5, learning_rate=0.1))
    assert torch.allclose(model[0].weight, before[0].weight * (1 - 0.1 * 0.5))
    assert torch.equal(model[0].bias, before[0].bias)


def test_muon_takes_the_matrices_given_and_adamw_the_rest() -> None:
    model, before = toy(), toy()
    hidden = model[0].weight
    loss_of = train(model, squared, batch_at, plan(steps=40, muon_learning_rate=0.05, weight_decay=0.0), matrices=[hidden])
    assert loss_of.losses[-1][1] < loss_of.losses[0][1]
    assert not same_weights(model[3], before[3])
    first, other = toy(), toy()
    train(first, squared, batch_at, plan(steps=1, warmup_steps=0, muon_learning_rate=0.05, weight_decay=0.0), matrices=[first[0].weight])
    step = (first[0].weight - other[0].weight).detach()
    spectrum = torch.linalg.svdvals(step)
    assert spectrum.min() > 0.3 * spectrum.max()  # orthogonalised: AdamW's and SGD's first steps are near rank one here
    assert not torch.allclose(first[3].weight, other[3].weight)


def test_gradients_are_clipped() -> None:
    def steep(model: nn.Module, batch: Batch) -> Tensor:
        return 1e6 * squared(model, batch)

    norms: list[float] = []
    model = toy()
    real = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        norms.append(float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()))
        return real(self, *args, **kwargs)

    torch.optim.AdamW.step = watched  # type: ignore[method-assign]
    try:
        train(model, steep, batch_at, plan(steps=3, grad_clip=0.5))
    finally:
        torch.optim.AdamW.step = real  # type: ignore[method-assign]
    assert len(norms) == 3 and all(norm == pytest.approx(0.5, rel=1e-3) for norm in norms)


# Checkpoints.


def run_whole() -> tuple[nn.Module, TrainingReport]:
    model = toy()
    return model, train(model, squared, batch_at, plan())


@pytest.mark.parametrize("step", [1, 11, 19])
def test_resuming_after_a_kill_gives_the_weights_of_an_uninterrupted_run(step: int, tmp_path: Path) -> None:
    whole, report = run_whole()
    with pytest.raises(Killed):
        train(toy(), squared, killed_at(step), plan(), checkpoint=tmp_path / "state")
    model = toy()
    resumed = train(model, squared, batch_at, plan(), checkpoint=tmp_path / "state")
    assert same_weights(model, whole)
    assert resumed.losses == report.losses and resumed.steps == 20


@pytest.mark.parametrize("other", ["plan", "starting weights", "shape"])
def test_checkpoint_of_another_run_is_refused_and_kept(other: str, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(toy(), squared, killed_at(5), plan(), checkpoint=tmp_path / "state")
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1)) if other == "shape" else toy()
    if other == "starting weights":
        with torch.no_grad():
            model[0].weight[0, 0] += 0.1
    chosen = plan(learning_rate=0.03) if other == "plan" else plan()
    with pytest.raises(InvalidRequest, match="another plan or other starting weights"):
        train(model, squared, batch_at, chosen, checkpoint=tmp_path / "state")
    again = toy()
    train(again, squared, batch_at, plan(), checkpoint=tmp_path / "state")
    assert same_weights(again, run_whole()[0])


def test_muon_state_is_resumed_too(tmp_path: Path) -> None:
    models = [toy() for _ in range(3)]
    muon = plan(muon_learning_rate=0.05)
    train(models[0], squared, batch_at, muon, matrices=[models[0][0].weight])
    with pytest.raises(Killed):
        train(models[1], squared, killed_at(9), muon, matrices=[models[1][0].weight], checkpoint=tmp_path / "state")
    train(models[2], squared, batch_at, muon, matrices=[models[2][0].weight], checkpoint=tmp_path / "state")
    assert same_weights(models[0], models[2])


def test_kill_while_a_checkpoint_is_written_leaves_the_last_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run_whole()
    real, saves = os.replace, []
    state, old = tmp_path / "state", tmp_path / "state.old"

    def dying(source: Any, target: Any) -> None:
        if Path(target) == state and old.exists():
            saves.append(target)
            if len(saves) == 3:  # the old checkpoint is moved away, the new one is not there yet
                raise Killed
        real(source, target)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(Killed):
        train(toy(), squared, batch_at, plan(), checkpoint=tmp_path / "state")
    monkeypatch.setattr(os, "replace", real)
    assert old.is_dir() and not state.exists()
    model = toy()
    report = train(model, squared, batch_at, plan(), checkpoint=state)
    assert same_weights(model, whole) and [step for step, _ in report.losses] == list(range(20))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state"]


def test_half_written_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(toy(), squared, killed_at(5), plan(), checkpoint=tmp_path / "state")
    shutil.copytree(tmp_path / "state", tmp_path / "state.new")
    (tmp_path / "state.new" / "progress.json").unlink()
    (tmp_path / "state.new" / "model.safetensors").write_bytes(b"cut")
    model = toy()
    train(model, squared, batch_at, plan(), checkpoint=tmp_path / "state")
    assert same_weights(model, run_whole()[0])


def test_running_a_finished_training_again_trains_no_more(tmp_path: Path) -> None:
    first, second = toy(), toy()
    train(first, squared, batch_at, plan(), checkpoint=tmp_path / "state")
    report = train(second, squared, killed_at(0), plan(), checkpoint=tmp_path / "state")
    assert same_weights(first, second) and report.steps == 20 and len(report.losses) == 20


def test_without_a_checkpoint_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(toy(), squared, batch_at, plan(steps=3))
    assert list(tmp_path.iterdir()) == []


# Stopping.


def test_stop_ends_the_run_saves_it_and_it_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    stop, model = Stop(), toy()

    def batches(step: int, process: int, processes: int) -> Batch:
        if step == 6:
            stop.request()
        return batch_at(step)

    report = train(model, squared, batches, plan(), checkpoint=tmp_path / "state", stop=stop)
    assert report.stopped == "stop requested" and report.steps == 7 and len(report.losses) == 7 and not model.training
    again = toy()
    finished = train(again, squared, batch_at, plan(), checkpoint=tmp_path / "state")
    assert finished.stopped is None and finished.steps == 20 and same_weights(again, run_whole()[0])


def test_stop_before_the_first_step_changes_nothing() -> None:
    stop, model = Stop(), toy()
    stop.request()
    report = train(model, squared, batch_at, plan(), stop=stop)
    assert report.steps == 0 and report.losses == [] and same_weights(model, toy())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("needs_grad", [pytest.param(True), False])
def test_loss_that_is_not_finite_is_a_calibration_error_with_the_step(bad: float, needs_grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # else torch warns once a process, and the result depends on what ran before
    steps: list[int] = []

    def batches(step: int, process: int, processes: int) -> Batch:
        steps.append(step)
        return batch_at(step)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        value = squared(model, batch)
        if steps[-1] < 3:
            return value
        return value * bad if needs_grad else torch.tensor(bad)

    try:
        with pytest.raises(CalibrationError, match=r"(nan|inf) at step 3\. Lower the learning rate"):
            train(toy(), loss, batches, plan())
    finally:
        torch.set_warn_always(before)


def test_early_stop_after_evaluations_without_a_new_best() -> None:
    values = iter([5.0, 4.0, 4.5, 4.0, 1.0])
    modes: list[bool] = []

    def evaluate(model: nn.Module) -> float:
        modes.append(model.training)
        return next(values)

    report = train(toy(), squared, batch_at, plan(evaluate_every=3, patience=2), evaluate=evaluate)
    assert report.evaluations == [(3, 5.0), (6, 4.0), (9, 4.5), (12, 4.0)]
    assert report.stopped == "no improvement" and report.steps == 12 and len(report.losses) == 12
    assert modes == [False] * 4


def test_patience_zero_never_stops_early() -> None:
    report = train(toy(), squared, batch_at, plan(evaluate_every=5), evaluate=lambda model: 1.0)
    assert report.stopped is None and [step for step, _ in report.evaluations] == [5, 10, 15, 20]


def test_training_goes_on_in_training_mode_after_an_evaluation() -> None:
    modes: list[bool] = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        modes.append(model.training)
        return squared(model, batch)

    train(toy(), loss, batch_at, plan(steps=4, evaluate_every=1), evaluate=lambda model: 1.0)
    assert modes == [True] * 4


def test_progress_tells_step_loss_and_time_left() -> None:
    seen: list[tuple[float, str]] = []
    report = train(toy(), squared, batch_at, plan(), progress=lambda fraction, message: seen.append((fraction, message)))
    assert seen[0][0] == pytest.approx(1 / 20)
    assert seen[0][1].startswith(f"step 1/20 loss {report.losses[0][1]:.3f} ") and seen[0][1].endswith("s left")


# Plans.


@pytest.mark.parametrize(("changes", "said"), [
    ({"steps": 0}, "steps is 0"), ({"steps": -3}, "at least 1"), ({"learning_rate": float("nan")}, "finite"),
    ({"learning_rate": -1e-3}, "not negative"), ({"learning_rate": float("inf")}, "finite"), ({"muon_learning_rate": float("nan")}, "finite"),
    ({"schedule": "warm"}, "use cosine, linear or trapezoid"),
    pytest.param({"steps": float("nan")}, "steps"),
    pytest.param({"steps": 2.5}, "steps"),
    pytest.param({"warmup_steps": -1}, "warmup"),
    pytest.param({"weight_decay": float("nan")}, "weight_decay"),
    pytest.param({"grad_clip": float("nan")}, "grad_clip"),
    pytest.param({"patience": -1}, "patience"),
], ids=str)
def test_bad_plan_is_refused_with_the_value(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        plan(**changes)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "trapezoid"])
def test_rate_warms_up_then_falls_to_the_final_fraction(schedule: str) -> None:
    chosen = TrainingPlan(steps=110, warmup_steps=10, schedule=schedule, final_fraction=0.1)
    rates = [chosen.rate(step) for step in range(110)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False)) and 0.1 <= rates[-1] < 0.13
    assert chosen.rate(110) == pytest.approx(0.1)


def test_schedules_have_the_shapes_they_are_named_after() -> None:
    half = {s: TrainingPlan(steps=100, warmup_steps=0, schedule=s, final_fraction=0.0) for s in ("cosine", "linear", "trapezoid")}
    assert half["cosine"].rate(50) == pytest.approx(0.5) and half["cosine"].rate(25) == pytest.approx(0.853553, abs=1e-6)
    assert half["linear"].rate(25) == pytest.approx(0.75)
    assert half["trapezoid"].rate(60) == pytest.approx(1.0) and half["trapezoid"].rate(80) == pytest.approx(0.5)


def test_optimizers_use_the_scheduled_rate() -> None:
    model, other = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        other.weight.copy_(model.weight)
    train(model, lambda model, batch: model.weight.sum(), batch_at, plan(steps=4, warmup_steps=4, weight_decay=0.0, learning_rate=0.1))
    # A constant gradient makes every AdamW step as long as its rate: 0.1 * (1 + 2 + 3 + 4) / 4.
    assert float((other.weight - model.weight).detach()) == pytest.approx(0.25, rel=1e-4)
