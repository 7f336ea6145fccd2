"""Sample weights in PyTorch Lightning: manual optimization.

    pip install -e ".[examples,integrations]"
    python examples/integrations/lightning_manual.py

Without the lines marked `# bilevel`, and with those after `# plain:` in their place, it is the
plain program, whose network is the same to the bit as long as φ stays.

Lightning's own `optimizer.step()` stays in the loop, so `global_step` counts, and the optimizer's
weight decay is part of the inner problem as everywhere.
"""

from __future__ import annotations

import lightning as L
import tyro
from _digits import SampleWeights, losses, mean_loss, network, noisy_digits, print_result
from torch import Tensor, nn
from torch.optim import SGD, Adam

from hyperopt_torch import BilevelOptimizer  # bilevel


class Cleaning(L.LightningModule):
    """A network whose training labels are partly wrong."""

    def __init__(self, val: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net, self.val = network(), val
        self.weight = SampleWeights()  # bilevel
        self.history: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def configure_optimizers(self) -> SGD:
        inner = SGD(self.net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        self.bilevel = BilevelOptimizer(inner, Adam(self.weight.parameters(), lr=0.1))  # bilevel
        return inner

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y, i = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        # plain: loss = losses(self(x), y).mean()
        loss = self.bilevel.record(lambda: (self.weight(i) * losses(z := self(x), y), z))  # bilevel
        self.manual_backward(loss)
        optimizer.step()
        # plain: self.history.append(mean_loss(self.net, self.val).detach())
        self.history.append(self.bilevel.outer_step(mean_loss(self.net, self.val)))  # bilevel


def main(epochs: int = 30) -> nn.Module:
    """Train while learning which labels to trust.

    Args:
        epochs: passes over the training samples.
    """
    digits = noisy_digits()
    model = Cleaning(digits.val)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, digits.batches())
    print_result(model.net, digits, model.history)
    print(f"global_step                   {trainer.global_step}")
    return model.net


if __name__ == "__main__":
    tyro.cli(main)
