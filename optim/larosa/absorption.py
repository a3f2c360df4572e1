"""Rotations written into a model's weights: the same function, its residual stream in other bases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.linear_layers import linear_weight, with_parameters
from core.reversible import Edits
from optim.larosa.modules import PlainNorm, ResidualAdapter
from optim.larosa.ops import fold_gain, remove_output_mean, rotate_reader, rotate_writer
from optim.larosa.structure import Norm, Structure, norm_eps


def absorb_rotations(structure: Structure, rotations: Sequence[Tensor], edits: Edits) -> list[str]:
    """Rotate the residual stream of block l into basis Q_l; the model's logits stay what they were, but for rounding.

    Source: LaRoSA (arXiv 2507.01299), section 3.3; LayerNorm to RMSNorm as in SliceGPT (arXiv 2401.15024), section 3.2.

    Args:
        structure: of a pre-norm or parallel family.
        rotations: Q of each block, [D, D]; neighbours that are the same tensor need no adapter between them.
        edits: the journal that takes every change.

    Returns:
        paths of the modules that were replaced or hooked.
    """
    model, architecture = structure.model, structure.architecture
    centred = structure.centred
    head: Any = model.get_output_embeddings()
    head_path, tied = structure.path_of(head), _is_tied(model)
    touched = [_rotate_table(structure, path, rotations[0], centred, edits) for path in (architecture.embedding, architecture.position_embedding) if path]
    for index, block in enumerate(structure.blocks):
        for norm in structure.norms:
            touched += _rotate_readers(structure, index, norm, rotations[index], edits)
            touched.append(_replace_norm(structure, structure.path(index, norm.name), edits))
        for _, name in structure.writers:
            layer = block.get_submodule(name)
            weight, bias = linear_weight(layer)
            if centred:
                weight, bias = remove_output_mean(weight, bias)
            weight, bias = rotate_writer(weight, bias, rotations[index])
            touched.append(_swap(structure, structure.path(index, name), with_parameters(layer, weight, bias), edits))
        if index and rotations[index] is not rotations[index - 1]:
            touched.append(_add_adapter(structure, index, rotations[index - 1].double().T @ rotations[index].double(), edits))
    assert architecture.final_norm is not None
    final: Any = model.get_submodule(architecture.final_norm)
    weight, bias = fold_gain(*linear_weight(head), final.weight, getattr(final, "bias", None))
    touched.append(_swap(structure, head_path, with_parameters(head, rotate_reader(weight, rotations[-1]), bias), edits))
    touched.append(_replace_norm(structure, architecture.final_norm, edits))
    if tied:
        edits.set_attr(model.config, "tie_word_embeddings", False)
    return touched


def rotate_inputs(structure: Structure, rotations: Sequence[Tensor], edits: Edits) -> list[str]:
    """The variant without absorption: norms give rotated vectors (one more product each), only readers are rewritten."""
    touched, centred = [], structure.centred
    for index in range(len(structure.blocks)):
        for norm in structure.norms:
            touched += _rotate_readers(structure, index, norm, rotations[index], edits)
            touched.append(_replace_norm(structure, structure.path(index, norm.name), edits, rotations[index], centred))
    return touched


def _is_tied(model: Any) -> bool:
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    return head.weight is table.weight


def _swap(structure: Structure, path: str, new: nn.Module, edits: Edits) -> str:
    edits.swap_module(structure.model, path, new)
    return path


def _rotate_table(structure: Structure, path: str, rotation: Tensor, centred: bool, edits: Edits) -> str:
    layer: Any = structure.model.get_submodule(path)
    rows = layer.weight.detach().double()
    if centred:
        rows = rows - rows.mean(-1, keepdim=True)
    return _swap(structure, path, with_parameters(layer, rotate_reader(rows, rotation)), edits)


def _rotate_readers(structure: Structure, index: int, norm: Norm, rotation: Tensor, edits: Edits) -> list[str]:
    block = structure.blocks[index]
    owner: Any = block.get_submodule(norm.name)
    touched = []
    for name in norm.readers:
        layer = block.get_submodule(name)
        weight, bias = fold_gain(*linear_weight(layer), owner.weight, getattr(owner, "bias", None))
        touched.append(_swap(structure, structure.path(index, name), with_parameters(layer, rotate_reader(weight, rotation), bias), edits))
    return touched


def _replace_norm(structure: Structure, path: str, edits: Edits, rotation: Tensor | None = None, centre: bool = False) -> str:
    old: Any = structure.model.get_submodule(path)
    turned = None if rotation is None else rotation.to(old.weight.dtype).to(old.weight.device)
    return _swap(structure, path, PlainNorm(norm_eps(old), centre=centre, rotation=turned), edits)


def _add_adapter(structure: Structure, index: int, weight: Tensor, edits: Edits) -> str:
    block = structure.blocks[index]
    like = next(block.parameters())
    adapter = ResidualAdapter(weight.to(like.dtype).to(like.device)).train(block.training)
    edits.set_attr(block, "residual_adapter", adapter)
    edits.add_hook(block.register_forward_pre_hook, adapter.enter, with_kwargs=True)
    return structure.path(index, "residual_adapter")


@torch.no_grad()
def orthogonality_error(rotations: Sequence[Tensor]) -> float:
    """Largest entry of |Q^T Q - I| over all rotations."""
    errors = [(q.double().T @ q.double() - torch.eye(q.shape[0], dtype=torch.float64)).abs().max() for q in rotations]
    return float(torch.stack(errors).max())
