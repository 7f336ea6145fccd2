"""Products by differences of gradients against double backward: time, memory, error.

    python -m benchmarks.differences

For each network one joint product (Hx, Jᵀx), float32, one thread: CPU seconds and peak memory of
`FiniteDifference()` over those of `Hessian()` (medians of pairs run in turn; memory is that of the
tensors alive at once beyond the parameters, the graph of ∇f included), the error of Hx and of Jᵀx
along the gradient, and how much the differences bend.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperopt_torch.operators import InnerGradient
from hyperopt_torch.plain_gradient import PlainGradient
from hyperopt_torch.recording import evaluate

from .overhead import paired_ratio
from .solve_cost import Memory


class Attention(nn.Module):
    """One block on a sequence, causal, four heads."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.head, self.shape = nn.Linear(width, 10), (length, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(len(x), *self.shape)
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return self.head((x + self.mlp(x)).mean(1))


def convolutional(act: type[nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 16, 3, padding=1),
        act(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        act(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # model, batch, inputs
    "tanh MLP 784-400-400-10": (
        lambda: nn.Sequential(
            nn.Linear(784, 400), nn.Tanh(), nn.Linear(400, 400), nn.Tanh(), nn.Linear(400, 10)
        ),
        128,
        784,
    ),
    "convolutions, SiLU": (lambda: convolutional(nn.SiLU), 64, 784),
    "convolutions, ReLU": (lambda: convolutional(nn.ReLU), 64, 784),
    "attention, 512 tokens": (lambda: Attention(64, 512), 4, 64 * 512),
}


def measure(make: Callable[[], nn.Module], batch: int, inputs: int) -> dict[str, float]:
    torch.manual_seed(0)
    model, phi = make(), torch.zeros(batch, requires_grad=True)
    x, y = torch.randn(batch, inputs), torch.randint(10, (batch,))
    inner = list(model.parameters())

    def loss() -> Tensor:
        losses = F.cross_entropy(model(x), y, reduction="none")
        return (phi.sigmoid() * losses).mean()

    def exact(v: Tensor) -> tuple[Tensor, Tensor]:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return InnerGradient(loss(), inner, [phi]).joint(v)

    def differences(v: Tensor) -> tuple[Tensor, Tensor]:
        return PlainGradient([(1.0, lambda: evaluate(loss))], inner, [phi]).differences(v)

    v = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), inner)])
    gradient = PlainGradient([(1.0, lambda: evaluate(loss))], inner, [phi])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        graph = InnerGradient(loss(), inner, [phi])
        found, expected = gradient.differences(v), graph.joint(v)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
        ratio = paired_ratio(partial(gradient.differences, v), partial(graph.joint, v), pairs=9)
    peaks = []
    for product in (differences, exact):
        with Memory() as seen:
            product(v)
        peaks.append(seen.peak)
    return {
        "time": ratio,
        "memory": peaks[0] / peaks[1],
        "Hx": errors[0],
        "Jx": errors[1],
        "kink": float(gradient.kink),
    }


def main() -> None:
    torch.set_num_threads(1)
    columns = ("time", "memory", "Hx", "Jx", "kink")
    print(
        "one joint product by differences / by double backward  "
        + "".join(f"{c:>9}" for c in columns)
    )
    for name, (make, batch, inputs) in NETWORKS.items():
        row = measure(make, batch, inputs)
        print(f"  {name:53}" + "".join(f"{row[c]:9.2g}" for c in columns), flush=True)


if __name__ == "__main__":
    main()
