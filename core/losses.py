"""Losses that several trainings share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that is not scored, as in torch and transformers."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `hidden @ weight.T`, its gradients taken chunk by chunk so that logits stay in cache."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:  # type: ignore[override]
        dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else weight.dtype
        h, w = hidden.detach().to(dtype), weight.detach().to(dtype)
        scored = labels != IGNORE
        count = scored.sum().clamp(min=1)
        grad_hidden = torch.empty_like(h)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=h.device)
        for start in range(0, len(h), chunk):
            part = slice(start, start + chunk)
            keep = scored[part]
            target = labels[part].clamp(min=0)[:, None]
            logits = (h[part] @ w.T).float()
            lse = logits.logsumexp(-1, keepdim=True)
            total += ((lse - logits.gather(1, target)).squeeze(1) * keep).sum()
            probs = logits.sub_(lse).exp_()
            probs.scatter_add_(1, target, probs.new_full(target.shape, -1.0))
            probs.mul_(keep[:, None] / count)
            slope = probs.to(dtype)
            grad_hidden[part] = slope @ w
            grad_weight += slope.T @ h[part]
        ctx.save_for_backward(grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype))
        return total / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = 512) -> Tensor:
    """Mean cross-entropy of a bias-free output head, without ever holding all logits.

    Args:
        hidden: [N, hidden_size], the head's input.
        weight: [vocab_size, hidden_size], the head.
        labels: [N] int64, IGNORE where a position is not scored. Already shifted by the caller.
        chunk: rows of logits held at once; 512 rows of an 8k vocabulary stay in a CPU's last-level cache.

    Returns:
        Scalar, nats per scored position; 0 when none is scored.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, chunk)
