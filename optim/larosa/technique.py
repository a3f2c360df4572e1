"""LaRoSA and its rivals as one technique: the variant says how activations are chosen, all else is the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from core.bundle import Bundle, storage_bytes, tensors_of
from core.calibration import calibration_windows, check_finite_weights
from core.errors import CalibrationError, UnsupportedModel
from core.progress import Progress, silent
from core.reversible import Edits
from core.technique import SIMULATED_NOTE, Effect, Label, Prepared, Report, Stage, Technique, option
from kernels.cuda.executor import NoExecutor, sparse_executor
from optim.larosa.absorption import absorb_rotations, rotate_inputs
from optim.larosa.allocation import search_multipliers
from optim.larosa.calibration import collect_magnitudes, collect_moments
from optim.larosa.executed import install_readers, refusal
from optim.larosa.modules import Site, ThresholdSite, TopKSite
from optim.larosa.ops import rotation_of
from optim.larosa.sites import HIGHEST, byte_shares, install_sites, kept_share, set_sparsity
from optim.larosa.structure import Structure, structure_of, weight_count

VARIANTS = ("larosa", "larosa_threshold", "one_rotation", "one_rotation_threshold", "online_rotation", "topk", "teal", "cats")
SEARCH_WINDOWS = 4
SEARCH_LENGTH = 512
_ONE = ("one_rotation", "one_rotation_threshold")
_ROTATED = ("larosa", "larosa_threshold", *_ONE, "online_rotation")
_THRESHOLDS = ("larosa_threshold", "one_rotation_threshold", "teal", "cats")


@dataclass(frozen=True)
class LaRoSA(Technique):
    """Layerwise rotated sparse activation: drop the smallest entries of what each layer reads, in a rotated basis.

    Source: LaRoSA (arXiv 2507.01299). Deviates: `sparsity` is the share of the blocks' weight bytes that are not needed,
    not the paper's knob; each kind of site has its own coefficient; the first tokens and, by default, the prompt stay dense.

    Variants: larosa (one rotation a layer, absorbed, adapters between layers); one_rotation (one for the model, no adapters); both
    with _threshold (TEAL's thresholds in the rotated basis, so that tokens differ in how many entries they keep; not in the paper);
    online_rotation (nothing absorbed but readers, one more product a norm); topk (unrotated); teal (arXiv 2408.14690,
    thresholds in place of Top-K); cats (arXiv 2404.08763, only behind the MLP's gate).
    """

    name: ClassVar[str] = "larosa"
    title: ClassVar[str] = "LaRoSA activation sparsity"
    summary: ClassVar[str] = "Rotates each layer's input so that most of its entries are small, and drops those: their weights need not be read."
    effect: ClassVar[Effect] = Effect.LOSSY
    stage: ClassVar[Stage] = Stage.ACTIVATIONS
    neutral_is_rounded: ClassVar[bool] = True

    sparsity: float = option(0.4, "Share of the blocks' weight bytes that a token does not need", minimum=0.0, maximum=0.95, step=0.05, neutral=0.0)
    variant: str = option("larosa", "How entries are chosen: larosa, or a rival measured by the same code", choices=VARIANTS)
    prefill: bool = option(False, "Sparsify the prompt too, not only the answer's tokens")
    exempt: int = option(4, "First positions of a text that always stay dense", minimum=0, maximum=64, step=1)
    calibration_tokens: int = option(8192, "Tokens of calibration text", minimum=256, maximum=1048576, step=256)

    def check(self, bundle: Bundle) -> None:
        """Refuses models that no rotation can be absorbed into, and quantised or adapted layers.

        Raises:
            UnsupportedModel: with the reason.
        """
        super().check(bundle)
        structure = structure_of(bundle.model, self.title)
        if self.variant == "cats":
            reach = _cats_reach(structure)
            if not reach or self.sparsity > reach:
                reason = "its MLP has no gate" if not reach else f"it can leave out at most {reach:.0%} of the blocks' weight bytes"
                raise UnsupportedModel(f"{self.title}: the variant cats does not fit {bundle.info.model_id} at sparsity {self.sparsity}: {reason}. Choose another variant.")

    def prepare_settings(self) -> dict[str, Any]:
        """All but what can be changed without calibrating anew."""
        return {k: v for k, v in self.settings().items() if k not in ("sparsity", "prefill")}

    def prepare(self, bundle: Bundle, data: Any = None, progress: Progress = silent) -> Prepared:
        """Calibrate on texts (`data`, a sequence of strings; the project's own when None).

        Raises:
            CalibrationError: too little text, or weights that are not finite.
        """
        self.check(bundle)
        check_finite_weights(bundle)
        length = min(SEARCH_LENGTH, bundle.context_length)
        if length <= self.exempt + 1:
            raise CalibrationError(f"The first {self.exempt} positions stay dense, and a window of this model has {length}: nothing is left to calibrate on. Set exempt lower.")
        tokens = -(-self.calibration_tokens // length) * length
        windows = calibration_windows(bundle, data, tokens + SEARCH_WINDOWS * length, length)
        # The last windows are for the search, apart from those that the rotations come from.
        tensors = self._calibrate(bundle, windows[:-SEARCH_WINDOWS], progress)
        multipliers, meta = self._spread(bundle, tensors, windows[-SEARCH_WINDOWS:], progress)
        return Prepared(tensors, {"multipliers": json.dumps(multipliers), **meta})

    def _calibrate(self, bundle: Bundle, windows: Sequence[Tensor], progress: Progress) -> dict[str, Tensor]:
        """Rotations "rotation.<block>" [D, D] float32 and magnitude quantiles "quantiles.<kind>.<block>" [1001] float32, as the variant needs."""
        tensors: dict[str, Tensor] = {}
        trial = bundle.clone()
        structure = structure_of(trial.model, self.title)
        if self.variant in _ROTATED:
            moments = collect_moments(structure, windows, self.exempt, progress)
            if self.variant in _ONE:
                moments = [torch.stack([m / m.trace() for m in moments]).sum(0)]
            tensors = {f"rotation.{i}": rotation_of(m).float() for i, m in enumerate(moments)}
        if self.variant in _THRESHOLDS:
            self._rotate(structure, tensors, Edits())  # magnitudes are those of the rotated basis
            kinds = ("gate",) if self.variant == "cats" else ("attention", "output", "mlp", "down")
            found = collect_magnitudes(structure, windows, self.exempt, kinds, progress)
            tensors.update({f"quantiles.{key}": values for key, values in found.items()})
        return tensors

    def _spread(self, bundle: Bundle, tensors: dict[str, Tensor], windows: Sequence[Tensor], progress: Progress) -> tuple[dict[str, float], dict[str, str]]:
        """Search the multipliers on a copy of the bundle; CATS has one kind of site and nothing to spread."""
        if self.variant == "cats":
            return {"gate": 1.0}, {}
        trial = bundle.clone()
        structure = structure_of(trial.model, self.title)
        sites, _ = self._install(structure, tensors, Edits())
        multipliers, loss, uniform = search_multipliers(structure, sites, windows, self.exempt, _quantiles(tensors), progress)
        return multipliers, {"search_loss": repr(loss), "search_loss_uniform": repr(uniform)}

    def _rotate(self, structure: Structure, tensors: dict[str, Tensor], edits: Edits) -> list[str]:
        """Rotate as the variant says; the paths of what was changed."""
        if self.variant not in _ROTATED:
            return []
        first = tensors["rotation.0"]
        rotations = [tensors.get(f"rotation.{i}", first) for i in range(len(structure.blocks))]
        return (rotate_inputs if self.variant == "online_rotation" else absorb_rotations)(structure, rotations, edits)

    def _install(self, structure: Structure, tensors: dict[str, Tensor], edits: Edits) -> tuple[list[Site], list[str]]:
        """Rotate, then put the sites in; what each keeps is not set yet."""
        touched = self._rotate(structure, tensors, edits)
        rule = ThresholdSite if self.variant in _THRESHOLDS else TopKSite
        sites, hung_on = install_sites(structure, rule, edits, prefill=self.prefill, exempt=self.exempt, gate_only=self.variant == "cats")
        return sites, list(dict.fromkeys([*touched, *hung_on]))

    def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
        structure = structure_of(bundle.model, self.title)
        tensors, multipliers = dict(prepared.tensors), json.loads(prepared.meta["multipliers"])
        before, shared = _weight_bytes(structure), {id(parameter) for parameter in bundle.model.parameters()}
        sites, touched = self._install(structure, tensors, edits)
        asked = self.sparsity * HIGHEST / _cats_reach(structure) if self.variant == "cats" else self.sparsity
        wanted = set_sparsity(sites, asked, multipliers, _quantiles(tensors))
        shares = {kind: kept_share(sites, kind) for kind in wanted} if self.variant not in _THRESHOLDS else {k: 1 - v for k, v in wanted.items()}
        rule = "thresholds that left on calibration text" if self.variant in _THRESHOLDS else "each token keeps"
        notes = (
            f"{rule} {', '.join(f'{share:.1%} of {kind} inputs' for kind, share in shares.items())}",
            f"bytes guarded: {', '.join(f'{kind} {share:.0%}' for kind, share in byte_shares(sites).items())}",
            "prompt and answer" if self.prefill else f"answer tokens only, the prompt and the first {self.exempt} positions stay dense",
        )
        label, note, swapped = self._execute(bundle, structure, sites, shared, edits)
        touched = list(dict.fromkeys([*touched, *swapped]))
        return Report(self.name, label, tuple(touched), {"output head": "never sparsified"}, before, _weight_bytes(structure), (*notes, note)), ()

    def _execute(self, bundle: Bundle, structure: Structure, sites: Sequence[Site], shared: set[int], edits: Edits) -> tuple[Label, str, list[str]]:
        """On CUDA, let the readers leave weights out; the label, its note and the paths of the readers."""
        executor = sparse_executor(bundle.device.type, bundle.device)
        reason = executor.reason if isinstance(executor, NoExecutor) else refusal(structure, sites, executor)
        if isinstance(executor, NoExecutor) or reason is not None:
            return Label.SIMULATED, f"{SIMULATED_NOTE} entries are set to zero and every weight is still read; {reason or 'the native runtime leaves the weights out'}", []
        own = {id(parameter) for parameter in bundle.model.parameters()} - shared
        paths = install_readers(structure, sites, own, executor, edits)
        return Label.EXECUTED, f"executed: a decode step does not read the weights of dropped entries ({len(paths)} layers, by Triton); prompts run in torch", paths


def _quantiles(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("quantiles."): value for key, value in tensors.items() if key.startswith("quantiles.")}


def _cats_reach(structure: Structure) -> float:
    """Highest byte-weighted sparsity that zeros behind the gate can give: 99 % of up's rows and down's columns."""
    if structure.gate is None:
        return 0.0
    guarded = (structure.architecture.mlp_in[1], structure.architecture.mlp_out)
    total = sum(weight_count(layer) for _, layer in structure.layers())
    return HIGHEST * sum(weight_count(block.get_submodule(name)) for block in structure.blocks for name in guarded) / total


def _weight_bytes(structure: Structure) -> int:
    return sum(storage_bytes(tensors_of([structure.model])).values())
