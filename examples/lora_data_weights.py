"""Which corpus to trust: weights of two corpora, learned while LoRA adapters are trained.

    pip install -e ".[examples,trainers]"
    python examples/lora_data_weights.py
    python examples/lora_data_weights.py --exact

A tiny GPT-2, randomly initialised, reads two corpora: text of a small grammar, and the same text
with its letters shuffled, which is noise. Only the adapters are inner parameters; the outer ones
are one logit a corpus, in f = Σ softmax(φ)_k · loss_k, and follow the loss on clean text. The right
answer: no weight for the noise.

Attention stays fused, which has no second derivative: products are differences of gradients.
`--exact` takes double backward instead, for which attention runs unfused in the outer steps.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import tyro
from _shared.output import save_figure
from peft import LoraConfig, get_peft_model
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from hyperopt_torch import BilevelOptimizer, FiniteDifference

SUBJECTS = ("the cat", "a dog", "the old man", "my sister", "every bird")
VERBS = ("sees", "likes", "follows", "never hears", "feeds")
LENGTH = 48


@dataclass
class Settings:
    """Learn which corpus to trust."""

    exact: bool = False
    """Products by double backward instead of differences of gradients."""
    steps: int = 300
    """Inner steps (AdamW)."""
    every: int = 5
    """Inner steps between two outer steps."""
    batch: int = 16
    """Pieces of text of each corpus."""
    rank: int = 8
    """Of the adapters."""
    seed: int = 0
    """Of everything."""
    out: Path = Path("results/lora_data_weights.png")
    """Where the figure goes."""


def pieces(count: int, g: torch.Generator, noise: bool) -> Tensor:
    """(count, LENGTH) characters of sentences; shuffled within each piece if they are noise."""
    rows = []
    for _ in range(count):
        text = ""
        while len(text) < LENGTH:
            a, v, b = (int(torch.randint(5, (), generator=g)) for _ in range(3))
            text += f"{SUBJECTS[a]} {VERBS[v]} {SUBJECTS[b]}. "
        row = torch.tensor([ord(c) - 32 for c in text[:LENGTH]])
        rows.append(row[torch.randperm(LENGTH, generator=g)] if noise else row)
    return torch.stack(rows)


def draw(path: list[tuple[int, float, float]], out: Path) -> None:
    """The weight of each corpus, and the loss on clean text that moved them."""
    steps, weights, losses = zip(*path, strict=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(steps, weights, label="clean text")
    left.plot(steps, [1 - weight for weight in weights], "C3", label="noise")
    left.set(xlabel="inner step", ylabel="weight of the corpus", ylim=(0, 1))
    left.legend(frameon=False)
    right.plot(steps, losses, "C7")
    right.set(xlabel="inner step", ylabel="loss on held-out clean text")
    save_figure(figure, out)


def main(settings: Settings) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    g = torch.Generator().manual_seed(settings.seed)
    config = GPT2Config(vocab_size=96, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4)
    lora = LoraConfig(r=settings.rank, target_modules=["c_attn", "c_fc"], lora_alpha=32)
    model = get_peft_model(GPT2LMHeadModel(config), lora)
    adapters = [p for p in model.parameters() if p.requires_grad]
    clean, noise, held_out = (pieces(400, g, kind) for kind in (False, True, False))
    phi = torch.zeros(2, requires_grad=True)

    def loss_of(batch: Tensor) -> Tensor:
        return model(input_ids=batch, labels=batch).loss

    optimizer = BilevelOptimizer(
        torch.optim.AdamW(adapters, lr=5e-3),
        torch.optim.Adam([phi], lr=0.2),
        curvature=None if settings.exact else FiniteDifference(),
    )
    start, path = time.perf_counter(), []
    for step in tqdm(range(settings.steps)):
        batches = [c[torch.randint(400, (settings.batch,), generator=g)] for c in (clean, noise)]

        def train_loss(batches: list[Tensor] = batches) -> Tensor:
            return phi.softmax(0) @ torch.stack([loss_of(batch) for batch in batches])

        optimizer.inner_step(train_loss)
        if step % settings.every == settings.every - 1:
            chosen = held_out[torch.randint(400, (settings.batch,), generator=g)]
            val_loss = optimizer.outer_step(loss_of(chosen))
            path.append((step + 1, float(phi.detach().softmax(0)[0]), float(val_loss)))
    with torch.no_grad():
        final = float(loss_of(held_out))
    print(f"adapters                {sum(p.numel() for p in adapters)} parameters")
    weights = phi.detach().softmax(0).tolist()
    print(f"weight of clean text    {weights[0]:.3f}")
    print(f"weight of the noise     {weights[1]:.3f}")
    print(f"loss on clean text      {final:.3f}")
    print(f"products of the last    {optimizer.report.matvecs}")
    print(f"seconds                 {time.perf_counter() - start:.0f}")
    draw(path, settings.out)


if __name__ == "__main__":
    main(tyro.cli(Settings))
