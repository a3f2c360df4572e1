"""Sites in a model: where they stand, how much each keeps, and what was measured at them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from core.reversible import Edits
from optim.larosa.calibration import threshold_for
from optim.larosa.modules import ExactZeroSite, Site, ThresholdSite, TokenPosition, TopKSite
from optim.larosa.ops import keep_counts, site_sparsities
from optim.larosa.structure import Structure, weight_count

HIGHEST = 0.99
"""No site goes beyond this share of zeros."""


def install_sites(structure: Structure, rule: type[Site], edits: Edits, *, prefill: bool, exempt: int, gate_only: bool = False) -> tuple[list[Site], list[str]]:
    """Put a site before everything that reads activations inside the blocks, or only behind the gates.

    Returns:
        the sites in forward order, and the paths of the modules they hang on.
    """
    position = TokenPosition()
    edits.add_hook(structure.decoder.register_forward_pre_hook, position.note, with_kwargs=True)
    sites, touched = [], []

    def add(index: int, name: str, kind: str, readers: Sequence[str], use: type[Site], *, behind: bool) -> None:
        block = structure.blocks[index]
        layers = [block.get_submodule(reader) for reader in readers]
        width = weight_count(layers[-1]) // _outputs(layers[-1])
        site = use(kind, width, sum(weight_count(layer) for layer in layers), position, prefill=prefill, exempt=exempt)
        module = block.get_submodule(name)
        site.readers = tuple(structure.path(index, reader) for reader in readers)
        site.train(module.training)
        edits.set_attr(module, "activation_site", site)
        edits.add_hook(module.register_forward_hook if behind else module.register_forward_pre_hook, site.after if behind else site.before)
        sites.append(site)
        touched.append(structure.path(index, name))

    architecture = structure.architecture
    for index in range(len(structure.blocks)):
        if gate_only:
            assert structure.gate is not None
            add(index, structure.gate, "gate", (architecture.mlp_in[1], architecture.mlp_out), rule, behind=True)
            continue
        for norm in structure.norms:
            add(index, norm.name, norm.kind, norm.readers, rule, behind=True)
        for kind, name in structure.writers:
            exact = kind == "down" and structure.activation == "relu"
            add(index, name, kind, (name,), ExactZeroSite if exact else rule, behind=False)
    return sites, touched


def _outputs(layer: nn.Module) -> int:
    return int(getattr(layer, "out_features", 0) or layer.nf)  # type: ignore[arg-type]


def sites_of(model: nn.Module) -> list[Site]:
    """Every site in a model, in module order."""
    return [module for module in model.modules() if isinstance(module, Site)]


def budgeted(sites: Sequence[Site]) -> list[Site]:
    """The sites that a sparsity is asked of; exact zeros come by themselves and are counted apart."""
    return [site for site in sites if not isinstance(site, ExactZeroSite)]


def byte_shares(sites: Sequence[Site]) -> dict[str, float]:
    """Each kind's share of the weights that budgeted sites guard."""
    weights: dict[str, int] = defaultdict(int)
    for site in budgeted(sites):
        weights[site.kind] += site.weights
    total = sum(weights.values())
    return {kind: count / total for kind, count in weights.items()}


def set_sparsity(sites: Sequence[Site], sparsity: float, multipliers: Mapping[str, float], quantiles: Mapping[str, Tensor] | None = None) -> dict[str, float]:
    """Give every site its number of entries, or its threshold; the byte-weighted mean is `sparsity`.

    Args:
        multipliers: relative sparsity of each kind of site.
        quantiles: "kind.block" -> magnitudes, for threshold sites.

    Returns:
        the sparsity of each kind.
    """
    wanted = site_sparsities(sparsity, {k: multipliers.get(k, 1.0) for k in byte_shares(sites)}, byte_shares(sites), HIGHEST)
    for kind, share in wanted.items():
        group = [site for site in budgeted(sites) if site.kind == kind]
        for site, keep in zip(group, keep_counts(share, [site.width for site in group]), strict=True):
            if isinstance(site, TopKSite):
                site.keep = keep
        for index, site in enumerate(group):
            if isinstance(site, ThresholdSite):
                assert quantiles is not None
                site.threshold = threshold_for(quantiles[f"{kind}.{index}"], share)
    return wanted


def kept_share(sites: Sequence[Site], kind: str) -> float:
    """Share of the entries that Top-K sites of a kind keep."""
    chosen = [site for site in sites if site.kind == kind and isinstance(site, TopKSite)]
    return sum(site.keep for site in chosen) / sum(site.width for site in chosen)


@contextmanager
def counting(sites: Sequence[Site]) -> Iterator[None]:
    """Count kept entries inside the block; read them with `measured` afterwards, before counting anew."""
    for site in sites:
        site.count(True)
    try:
        yield
    finally:
        for site in sites:
            site.counting = False


@dataclass(frozen=True)
class Measured:
    """What the sites counted. All shares are of weight entries, so of weight bytes.

    sparsity: share of the blocks' weights not needed, exact zeros behind a ReLU left out of both sides; None when nothing ran.
    kinds: zeros of each kind of site. exact_zeros: share of zeros that a ReLU left, whose weights are not needed without loss.
    """

    sparsity: float | None
    kinds: dict[str, float]
    exact_zeros: float | None


def measured(structure: Structure, sites: Sequence[Site]) -> Measured:
    """Read the counts off the sites."""
    seen = [(site, share) for site in sites if (share := site.measured_sparsity) is not None]
    asked = [(site, share) for site, share in seen if not isinstance(site, ExactZeroSite)]
    exact = [(site, share) for site, share in seen if isinstance(site, ExactZeroSite)]
    guarded = sum(weight_count(layer) for _, layer in structure.layers()) - sum(s.weights for s in sites if isinstance(s, ExactZeroSite))
    kinds = {kind: _mean([(s, v) for s, v in asked if s.kind == kind]) for kind in dict.fromkeys(s.kind for s, _ in asked)}
    return Measured(sum(s.weights * v for s, v in asked) / guarded if asked else None, kinds, _mean(exact) if exact else None)


def _mean(pairs: Sequence[tuple[Site, float]]) -> float:
    return sum(s.weights * v for s, v in pairs) / sum(s.weights for s, _ in pairs)
