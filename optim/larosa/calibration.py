"""What LaRoSA and its rivals learn from calibration text: second moments, and quantiles of magnitudes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from core.progress import Progress
from optim.larosa.ops import second_moment
from optim.larosa.structure import Structure, norm_eps

QUANTILES = 1001
_SAMPLED = 1 << 18
"""About so many magnitudes are kept of one site and window; the quantiles come from all windows together."""


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def _run(structure: Structure, windows: Sequence[Tensor], progress: Progress, what: str) -> None:
    base = structure.model.base_model
    for place, window in enumerate(windows):
        progress(place / len(windows), f"{what}, window {place + 1} of {len(windows)}")
        base(input_ids=window, use_cache=False)


def collect_moments(structure: Structure, windows: Sequence[Tensor], exempt: int, progress: Progress) -> list[Tensor]:
    """Second moment of what each block's attention reads, gain left out: the basis in which it will be sparsified.

    Source: LaRoSA, section 3.2 (uncentred, one rotation a layer, used for the MLP's input too).
    The first `exempt` positions, which stay dense at run time, are left out.

    Returns:
        one [D, D] float64 a block.
    """
    width = structure.model.config.get_text_config().hidden_size
    moments = [torch.zeros(width, width, dtype=torch.float64) for _ in structure.blocks]
    name, centred = structure.architecture.attention_norm, structure.centred

    def collect(index: int, eps: float) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows = args[0][:, exempt:].reshape(-1, width).float()
            if centred:
                rows = rows - rows.mean(-1, keepdim=True)
            moments[index] += second_moment(rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)).cpu()

        return hook

    norms = [block.get_submodule(name) for block in structure.blocks]
    with _hooks([norm.register_forward_pre_hook(collect(i, norm_eps(norm))) for i, norm in enumerate(norms)]):
        _run(structure, windows, progress, "second moments")
    return moments


def collect_magnitudes(structure: Structure, windows: Sequence[Tensor], exempt: int, kinds: Sequence[str], progress: Progress) -> dict[str, Tensor]:
    """Quantiles of |x| at sites of these kinds, "gate" included; TEAL and CATS take their thresholds from them.

    Returns:
        "kind.block" -> [1001] float32, from the smallest magnitude to the largest.
    """
    samples: dict[str, list[Tensor]] = {}

    def collect(key: str) -> Callable[[Tensor], None]:
        def take(x: Tensor) -> None:
            rows = x[:, exempt:].reshape(-1, x.shape[-1])
            count = max(1, _SAMPLED // rows.shape[1])
            if len(rows) > count:  # whole tokens: a step over single entries would meet the same channels again and again
                rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count].to(rows.device)]
            samples.setdefault(key, []).append(rows.abs().float().flatten().cpu())

        return take

    def hook_output(take: Callable[[Tensor], None]) -> Callable[..., None]:
        return lambda module, args, output: take(output)

    def hook_input(take: Callable[[Tensor], None]) -> Callable[..., None]:
        return lambda module, args: take(args[0])

    handles = []
    for index, block in enumerate(structure.blocks):
        for norm in structure.norms:
            if norm.kind in kinds:
                handles.append(block.get_submodule(norm.name).register_forward_hook(hook_output(collect(f"{norm.kind}.{index}"))))
        for kind, name in structure.writers:
            if kind in kinds:
                handles.append(block.get_submodule(name).register_forward_pre_hook(hook_input(collect(f"{kind}.{index}"))))
        if "gate" in kinds and structure.gate:
            handles.append(block.get_submodule(structure.gate).register_forward_hook(hook_output(collect(f"gate.{index}"))))
    with _hooks(handles):
        _run(structure, windows, progress, "magnitudes")
    return {key: _quantiles(torch.cat(parts)) for key, parts in samples.items()}


def _quantiles(values: Tensor) -> Tensor:
    ranked = values.sort().values
    places = torch.linspace(0, len(ranked) - 1, QUANTILES, dtype=torch.float64)
    low = places.floor().long()
    high = (low + 1).clamp(max=len(ranked) - 1)
    return torch.lerp(ranked[low].double(), ranked[high].double(), places - low).float()


def threshold_for(quantiles: Tensor, sparsity: float) -> float:
    """The magnitude below which a share `sparsity` of the entries lay in calibration."""
    place = sparsity * (QUANTILES - 1)
    low = min(int(place), QUANTILES - 2)
    return float(torch.lerp(quantiles[low].double(), quantiles[low + 1].double(), place - low))
