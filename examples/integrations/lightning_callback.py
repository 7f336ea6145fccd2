"""Sample weights in PyTorch Lightning: automatic optimization, a callback for the outer step.

    pip install -e ".[examples,integrations]"
    python examples/integrations/lightning_callback.py

Without the lines marked `# bilevel`, and with those after `# plain:` in their place, it is the
plain program, whose network is the same to the bit as long as φ stays.

Lightning calls `training_step` from inside `optimizer.step(closure)`; what is recorded there is
the problem of that step. `Unrolled` and `PZOBO`, which look at the step itself, need manual
optimization: lightning_manual.py.
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
        self.net, self.val = network(), val
        self.weight = SampleWeights()  # bilevel

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def configure_optimizers(self) -> SGD:
        inner = SGD(self.net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        self.bilevel = BilevelOptimizer(inner, Adam(self.weight.parameters(), lr=0.1))  # bilevel
        return inner

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y, i = batch
        # plain: return losses(self(x), y).mean()
        return self.bilevel.record(lambda: (self.weight(i) * losses(z := self(x), y), z))  # bilevel


class Watch(L.Callback):
    """The validation loss after every step."""

    def __init__(self) -> None:
        self.history: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Cleaning, *_: object) -> None:
        # plain: self.history.append(mean_loss(module.net, module.val).detach())
        self.history.append(module.bilevel.outer_step(mean_loss(module.net, module.val)))  # bilevel


def main(epochs: int = 30) -> nn.Module:
    """Train while learning which labels to trust.

    Args:
        epochs: passes over the training samples.
    """
    digits, watch = noisy_digits(), Watch()
    model = Cleaning(digits.val)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=watch,
        logger=False,
        barebones=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, digits.batches())
    print_result(model.net, digits, watch.history)
    return model.net


if __name__ == "__main__":
    tyro.cli(main)
