"""LaRoSA's decode steps on CUDA: readers that leave out the weights of the entries that their site has dropped."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from core.linear_layers import linear_weight
from core.reversible import Edits
from kernels.cuda.executor import SparseExecutor
from optim.larosa.modules import Site
from optim.larosa.structure import Structure


class SparseReader(nn.Module):
    """y = W x + bias, over the chosen channels where its site has just chosen them, else by torch.

    The weight lies input channel by input channel; `weight` is the [out, in] view of that which everybody else expects.
    """

    bias: nn.Parameter | None

    def __init__(self, layer: nn.Module, site: Site, executor: SparseExecutor) -> None:
        super().__init__()
        weight, bias = linear_weight(layer)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.T.contiguous().T, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self._site, self._executor = (site,), executor  # in a tuple: the site is another module's child
        self.sparse_steps = 0
        """Calls that left weights out."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        selection = self._site[0].selection
        if selection is None or not selection.is_of(x):
            return nn.functional.linear(x, self.weight, self.bias)
        self.sparse_steps += 1
        return self._executor.product(self.weight.T, selection, self.bias).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def refusal(structure: Structure, sites: Sequence[Site], executor: SparseExecutor) -> str | None:
    """Why these sites' readers cannot leave weights out; None when they can."""
    if any(site.kind == "gate" for site in sites):
        return "the variant cats drops outputs behind the gate, and the product leaves out inputs"
    for path, layer in structure.layers():
        dtype = linear_weight(layer)[0].dtype
        if dtype not in executor.dtypes:
            return f"{path} is in {str(dtype).removeprefix('torch.')}"
    return None


def install_readers(structure: Structure, sites: Sequence[Site], own: set[int], executor: SparseExecutor, edits: Edits) -> list[str]:
    """Swap every layer behind a site for a SparseReader.

    Args:
        own: ids of weights that this technique has made and nobody else holds; they are laid out anew in place, so that they cost no second copy.

    Returns:
        the paths of the layers.
    """
    touched = []
    for site in sites:
        edits.set_attr(site, "executor", executor)
        for path in site.readers:
            layer = structure.model.get_submodule(path)
            reader = _in_place_of(layer, site, executor)
            if id(layer.weight) in own and not isinstance(layer, Conv1D):  # a Conv1D lies so from the start
                layer.weight.data = reader.weight.data  # type: ignore[union-attr,assignment]
            edits.swap_module(structure.model, path, reader)
            touched.append(path)
    return touched


def _in_place_of(layer: nn.Module, site: Site, executor: SparseExecutor) -> SparseReader:
    """A reader that takes over what hangs on `layer`."""
    new = SparseReader(layer, site, executor)
    new._forward_hooks = copy.copy(layer._forward_hooks)
    new._forward_pre_hooks = copy.copy(layer._forward_pre_hooks)
    for name, child in layer.named_children():
        new.add_module(name, child)
    return new
