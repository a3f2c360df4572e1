"""Quality against bytes: LaRoSA and its rivals on one model, calibrated alike, scored as decode would run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from core.bundle import Bundle, storage_bytes, tensors_of
from core.calibration import calibration_windows
from core.datasets import is_held_out
from core.errors import CalibrationError, FuseboxError, InvalidRequest
from core.prepared_cache import cache_path, cached_prepare
from core.progress import Progress, silent
from core.technique import Prepared
from engines.embedded.instructions import HELD_OUT_PERCENT, load_instructions
from optim.larosa.allocation import sparse_logits
from optim.larosa.modules import ResidualAdapter
from optim.larosa.sites import counting, measured, sites_of
from optim.larosa.structure import structure_of, weight_count
from optim.larosa.technique import VARIANTS, LaRoSA

SPARSITIES = (0.0, 0.25, 0.4, 0.5, 0.75)
WINDOW = 512
TEMPERATURES = (1.0, 1.1, 1.25, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0)


@dataclass(frozen=True)
class Reference:
    """The dense model on the text: windows, its choice of each token, its logits [tokens, vocab_size] in bfloat16, its loss.

    tempered_nats: the loss with all logits divided by each of TEMPERATURES.
    """

    windows: tuple[Tensor, ...]
    choices: tuple[Tensor, ...]
    predictions: tuple[Tensor, ...]
    tempered_nats: tuple[float, ...]
    text_bytes: int
    tokens: int

    def figures(self, tempered_nats: Sequence[float]) -> dict[str, float]:
        """Bits per byte as the logits are, and with the temperature that suits them best: the first also counts being too sure, the second does not."""
        best = min(range(len(TEMPERATURES)), key=lambda i: tempered_nats[i])
        scale = 1 / math.log(2) / self.text_bytes
        return {"bits_per_byte": tempered_nats[0] * scale, "bits_per_byte_tempered": tempered_nats[best] * scale, "temperature": TEMPERATURES[best]}


def dense_reference(bundle: Bundle, texts: Sequence[str], tokens: int, exempt: int) -> Reference:
    """Score `texts` with the model as it is.

    Raises:
        CalibrationError: too little text.
    """
    structure = structure_of(bundle.model, "The sweep")
    try:
        windows = calibration_windows(bundle, texts, tokens, min(WINDOW, bundle.context_length))
    except CalibrationError as error:
        raise CalibrationError(f"To score on: {error}") from error
    choices, predictions, nats, text_bytes, scored = [], [], [0.0] * len(TEMPERATURES), 0, 0
    for window in windows:
        targets = window[0, max(1, exempt) :]
        logits = sparse_logits(structure, (), window, exempt)
        nats = [a + b for a, b in zip(nats, _tempered(logits, targets), strict=True)]
        choices.append(logits.argmax(-1))
        predictions.append(logits.bfloat16())
        text_bytes += len(str(bundle.tokenizer.decode(targets, skip_special_tokens=True)).encode())
        scored += len(targets)
    return Reference(tuple(windows), tuple(choices), tuple(predictions), tuple(nats), text_bytes, scored)


def _tempered(logits: Tensor, targets: Tensor) -> list[float]:
    return [float(cross_entropy(logits / temperature, targets, reduction="sum")) for temperature in TEMPERATURES]


def score_variant(bundle: Bundle, technique: LaRoSA, prepared: Prepared, reference: Reference) -> dict[str, Any]:
    """One row: quality, agreement and bytes of a variant at a sparsity."""
    with technique.apply(bundle, prepared) as applied:
        structure = structure_of(bundle.model, "The sweep")
        sites = sites_of(bundle.model)
        nats, same, divergence = [0.0] * len(TEMPERATURES), 0, 0.0
        with counting(sites):
            for window, chosen, dense in zip(reference.windows, reference.choices, reference.predictions, strict=True):
                logits = sparse_logits(structure, sites, window, technique.exempt)
                nats = [a + b for a, b in zip(nats, _tempered(logits, window[0, max(1, technique.exempt) :]), strict=True)]
                same += int((logits.argmax(-1) == chosen).sum())
                divergence += float(kl_div(logits.log_softmax(-1), dense.float().log_softmax(-1), reduction="sum", log_target=True))
        seen = measured(structure, sites)
        return {
            "variant": technique.variant, "sparsity": technique.sparsity, **reference.figures(nats),
            "kl_to_dense": divergence / reference.tokens, "agreement": same / reference.tokens, "measured_sparsity": seen.sparsity, "site_sparsity": seen.kinds, "exact_zeros": seen.exact_zeros,
            **bytes_per_token(bundle, seen.sparsity or 0.0, seen.exact_zeros), "notes": list(applied.report.notes),
        }


def bytes_per_token(bundle: Bundle, sparsity: float, exact_zeros: float | None = None) -> dict[str, int]:
    """Weight bytes that one decoded token needs: kept parts of the blocks' weights, adapters, and everything else but embedding rows.

    Args:
        sparsity: byte-weighted share of the budgeted weights that are not needed.
        exact_zeros: share of zeros behind ReLUs, whose weights are not needed either; those layers are not part of `sparsity`.
    """
    structure = structure_of(bundle.model, "The sweep")
    size = next(bundle.model.parameters()).element_size()
    exact = sum(weight_count(b.get_submodule(structure.architecture.mlp_out)) for b in structure.blocks) if exact_zeros is not None else 0
    budgeted = sum(weight_count(layer) for _, layer in structure.layers()) - exact
    adapters = sum(weight_count(m.linear) for m in bundle.model.modules() if isinstance(m, ResidualAdapter))
    everything = sum(storage_bytes(tensors_of([bundle.model])).values())
    tables = sum(storage_bytes(tensors_of([bundle.model.get_submodule(p) for p in (structure.architecture.embedding, structure.architecture.position_embedding) if p])).values())
    head: Any = bundle.model.get_output_embeddings()
    tied = head.weight.untyped_storage().data_ptr() in storage_bytes(tensors_of([bundle.model.get_input_embeddings()]))
    rest = everything - (budgeted + exact + adapters) * size - tables + (head.weight.numel() * size if tied else 0)
    blocks = budgeted * (1 - sparsity) + exact * (1 - (exact_zeros or 0.0))
    return {"bytes_per_token": round(blocks * size) + adapters * size + rest, "adapter_bytes": adapters * size, "head_and_rest_bytes": rest}


def sweep(
    bundle: Bundle, texts: Sequence[str], *, sparsities: Sequence[float] = SPARSITIES, variants: Sequence[str] = VARIANTS,
    calibration: Sequence[str] | None = None, tokens: int = 8192, calibration_tokens: int = 8192, progress: Progress = silent,
) -> dict[str, Any]:
    """Every variant at every sparsity.

    Args:
        texts: what is scored; keep it apart from what is calibrated on.
        calibration: what is calibrated on; the project's own text when None.
        tokens: how many tokens of `texts` are scored.

    Returns:
        "dense" (bits per byte, also at its best temperature, bytes per token, tokens), "rows", "refused" (variants or sparsities that do not fit, with the reason), and
        "calibration" (seconds by variant, None where it was kept from an earlier run).

    Raises:
        InvalidRequest: an unknown variant or a sparsity out of range, before anything is computed.
        CalibrationError, UnsupportedModel: as the technique raises them.
    """
    plans = [LaRoSA(sparsity=s, variant=v, calibration_tokens=calibration_tokens) for v in variants for s in sparsities]
    if not plans:
        raise InvalidRequest("The sweep has nothing to do: give at least one sparsity and one variant.")
    LaRoSA().check(bundle)
    reference = dense_reference(bundle, texts, tokens, plans[0].exempt)
    out: dict[str, Any] = {
        "dense": {**reference.figures(reference.tempered_nats), "tokens": reference.tokens, **bytes_per_token(bundle, 0.0)}, "rows": [], "refused": [], "calibration": {},
    }
    for place, plan in enumerate(plans):
        progress(place / len(plans), f"{plan.variant} at {plan.sparsity:g}")
        try:
            plan.check(bundle)
            known = cache_path(plan, bundle, calibration).is_file()
            began = time.perf_counter()
            prepared = cached_prepare(plan, bundle, calibration, _scaled(progress, place, len(plans)))
            out["calibration"].setdefault(plan.variant, {"seconds": None if known else time.perf_counter() - began, **prepared.meta})
            out["rows"].append(score_variant(bundle, plan, prepared, reference))
        except FuseboxError as error:
            out["refused"].append({"variant": plan.variant, "sparsity": plan.sparsity, "reason": str(error)})
    if not out["rows"]:
        raise InvalidRequest(out["refused"][0]["reason"])
    return out


def _scaled(progress: Progress, place: int, of: int) -> Progress:
    return lambda fraction, message: progress((place + fraction) / of, message)


def by_variant(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Rows of each variant, by bytes."""
    for variant in dict.fromkeys(row["variant"] for row in rows):
        yield variant, sorted((r for r in rows if r["variant"] == variant), key=lambda r: r["bytes_per_token"])


def held_out_project_texts() -> list[str]:
    """Texts of the project that neither the embedded model nor any calibration sees."""
    data = load_instructions()
    return [row["text"] for row in (*data.summaries, *data.reading) if is_held_out(row["id"], HELD_OUT_PERCENT)]
