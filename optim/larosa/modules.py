"""What LaRoSA puts into a model: sites that drop activations, norms without gain, and the adapters between bases."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache

from core.phase import is_prompt
from kernels.cuda.executor import SparseExecutor
from optim.larosa.ops import keep_above, keep_largest

if TYPE_CHECKING:  # needs Triton
    from kernels.cuda.selection import Selection


class TokenPosition(threading.local):
    """Where the tokens of the running forward call stand in their text; one a thread."""

    start = 0
    """Tokens already in the KV cache."""

    def note(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the decoder, however its cache is handed over."""
        cache = next((given for given in (*kwargs.values(), *args) if isinstance(given, Cache)), None)
        self.start = int(cache.get_seq_length()) if cache is not None else 0

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenPosition:
        return memo.setdefault(id(self), TokenPosition())


class Site(nn.Module):
    """A place where layers read activations: entries are dropped here, and the weights they meet are not needed.

    kind: "attention" (input of q, k, v), "output" (of o), "mlp" (of gate and up, or fc1), "down" (of down, or fc2).
    weights: weight entries of the layers that read here.
    prefill: also drop while the prompt is read; else it stays dense.
    exempt: this many first positions of a text stay dense, whatever the call. Padding on the left counts as positions.
    readers: paths of the layers that read here.
    executor: chooses single tokens' entries in a form that readers can leave weights out by; None: zeros are all there is.
    selection: what the last call chose, while it was one token and there was an executor.
    """

    executor: SparseExecutor | None = None
    readers: tuple[str, ...] = ()

    def __init__(self, kind: str, width: int, weights: int, position: TokenPosition, *, prefill: bool, exempt: int) -> None:
        super().__init__()
        self.kind, self.width, self.weights = kind, width, weights
        self.position, self.prefill, self.exempt = position, prefill, exempt
        self.selection: Selection | None = None
        self.rows = self.kept = 0
        self.counting = False

    def drop(self, x: Tensor) -> Tensor:
        """`x` [..., width] with entries of each row set to zero."""
        raise NotImplementedError

    def select(self, x: Tensor, executor: SparseExecutor) -> Selection:
        """`drop` of one token, by an executor."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """`x` [B, T, width] with the rows that are not exempt sparsified."""
        self.selection = None
        tokens = x.shape[-2]
        dense = max(0, self.exempt - self.position.start)
        if dense >= tokens or (not self.prefill and is_prompt(tokens)):
            return x
        if self.executor is not None and x.numel() == self.width and dense == 0:
            self.selection = self.select(x.contiguous(), self.executor)
            out = self.selection.kept
        else:
            out = self._drop_after(x, dense)
        if self.counting:
            self.rows += out[..., dense:, 0].numel()
            self.kept += int(out[..., dense:, :].count_nonzero())
        return out

    def _drop_after(self, x: Tensor, dense: int) -> Tensor:
        return self.drop(x) if dense == 0 else torch.cat([x[..., :dense, :], self.drop(x[..., dense:, :])], dim=-2)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of a norm whose output the layers read."""
        return self(output)  # type: ignore[no-any-return]

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook of the layer that reads."""
        return (self(args[0]), *args[1:])

    def count(self, on: bool) -> None:
        """Start counting from zero, or stop."""
        self.rows = self.kept = 0
        self.counting = on

    @property
    def measured_sparsity(self) -> float | None:
        """Share of zeros over the rows counted; None when there were none."""
        return 1.0 - self.kept / (self.rows * self.width) if self.rows else None


class TopKSite(Site):
    """Keeps the `keep` largest entries of each token."""

    keep: int = 0

    def drop(self, x: Tensor) -> Tensor:
        """Top-K per token."""
        return keep_largest(x, self.keep)

    def select(self, x: Tensor, executor: SparseExecutor) -> Selection:
        """The same; of equal entries the first."""
        return executor.largest(x, self.keep)


class ThresholdSite(Site):
    """Keeps entries above a threshold found in calibration."""

    threshold: float = 0.0

    def drop(self, x: Tensor) -> Tensor:
        """Magnitude threshold, another number of entries for each token."""
        return keep_above(x, self.threshold)

    def select(self, x: Tensor, executor: SparseExecutor) -> Selection:
        """The same."""
        return executor.above(x, self.threshold)


class ExactZeroSite(Site):
    """Drops nothing: a ReLU before it leaves exact zeros, whose weights are not needed without any loss."""

    def drop(self, x: Tensor) -> Tensor:
        """As it is."""
        return x

    def select(self, x: Tensor, executor: SparseExecutor) -> Selection:
        """What is not zero."""
        return executor.nonzero(x)


class PlainNorm(nn.Module):
    """Norm without gain and shift; with `rotation`, its output is written in that basis.

    centre: subtract the mean first, as a LayerNorm does; the residual stream need not be centred then.
    """

    rotation: Tensor | None

    def __init__(self, eps: float, *, centre: bool = False, rotation: Tensor | None = None) -> None:
        super().__init__()
        self.eps, self.centre = eps, centre
        self.register_buffer("rotation", rotation)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D], half precision computed in float32."""
        wide = x if x.dtype == torch.float64 else x.float()
        if self.centre:
            wide = wide - wide.mean(-1, keepdim=True)
        out = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        return out if self.rotation is None else out @ self.rotation

    def extra_repr(self) -> str:
        return f"eps={self.eps}, centre={self.centre}, rotated={self.rotation is not None}"


class ResidualAdapter(nn.Module):
    """R = Q_l^T Q_{l+1}: carries the residual stream from one layer's basis into the next one's (LaRoSA, section 3.3)."""

    def __init__(self, weight: Tensor) -> None:
        """weight: R [D, D]."""
        super().__init__()
        self.linear = nn.Linear(weight.shape[0], weight.shape[1], bias=False, device="meta")
        self.linear.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x R for [..., D]."""
        return self.linear(x)  # type: ignore[no-any-return]

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of a decoder block: its hidden states, the first argument, change basis."""
        if args:
            return (self(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self(kwargs["hidden_states"])}
