"""Per-sample gradients of a recorded evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from .._tensors import FlatLayout
from .again import World
from .closure import Evaluation

_BATCHED_ON_CPU = 4096  # parameters; from there on batching rows saves nothing there (measured)


def sample_rows(
    evaluation: Evaluation, parameters: list[Tensor], layout: FlatLayout, chosen: Sequence[int]
) -> Tensor:
    """(m, n) rows √w_i ∇ℓ_i for the chosen samples; a negative weight counts as zero.

    One backward pass a row, through the graph of the whole batch: the losses share it.
    """
    losses, weights = evaluation.per_sample, evaluation.weights
    assert losses is not None
    index = torch.tensor(chosen, device=losses.device)
    seeds = torch.zeros(len(chosen), len(losses), dtype=losses.dtype, device=losses.device)
    root = torch.ones_like(losses) if weights is None else weights.detach().clamp(min=0).sqrt()
    root = root.to(losses.dtype).index_select(0, index)
    seeds.scatter_(1, index[:, None], root[:, None])

    def pull(seed: Tensor, batched: bool) -> Tensor:
        grads = torch.autograd.grad(
            losses, parameters, seed, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
        return layout.flatten(grads, batched=batched)

    with World([], layout.device):  # activation checkpoints run modules again
        if layout.n <= _BATCHED_ON_CPU or layout.device.type != "cpu":
            with suppress(RuntimeError):  # an operation without a batching rule, or out of memory
                return pull(seeds, batched=True)
        return torch.stack([pull(seed, batched=False) for seed in seeds])
