"""Sample weights in a loop by Hugging Face Accelerate: accumulation, clipping, mixed precision.

    pip install -e ".[examples,integrations]"
    python examples/integrations/accelerate_loop.py
    python examples/integrations/accelerate_loop.py --precision bf16

Without the lines marked `# bilevel`, and with those after `# plain:` in their place, it is the
plain program, whose network is the same to the bit as long as φ stays.

The two micro-batches that make a step are one inner problem: their mean. Clipping changes the way
to the optimum, not the optimum. fp16 needs a GPU, by Accelerate's own word; its scaler may skip a
step, which then is none.
"""

from __future__ import annotations

from typing import Literal

import tyro
from _digits import SampleWeights, losses, mean_loss, network, noisy_digits, print_result
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import SGD, Adam
from tqdm import trange

from hyperopt_torch import BilevelOptimizer  # bilevel


def main(epochs: int = 30, precision: Literal["no", "bf16", "fp16"] = "no") -> nn.Module:
    """Train while learning which labels to trust.

    Args:
        epochs: passes over the training samples.
        precision: in which the network computes; its parameters are float32.
    """
    accelerator = Accelerator(gradient_accumulation_steps=2, mixed_precision=precision)
    digits, plain_net = noisy_digits(), network()
    inner = SGD(plain_net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    net, optimizer, batches = accelerator.prepare(plain_net, inner, digits.batches(32))
    val = [t.to(accelerator.device) for t in digits.val]
    weight = SampleWeights().to(accelerator.device)  # bilevel
    bilevel = BilevelOptimizer(optimizer, Adam(weight.parameters(), lr=0.1))  # bilevel
    history: list[Tensor] = []
    for _ in trange(epochs):
        for x, y, i in batches:
            with accelerator.accumulate(net):
                # plain: loss = losses(net(x), y).mean()
                loss = bilevel.record(lambda: (weight(i) * losses(z := net(x), y), z))  # bilevel
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                # plain: history.append(mean_loss(net, val).detach())
                history.append(bilevel.outer_step(mean_loss(net, val)))  # bilevel
    print_result(plain_net.cpu(), digits, history)
    return plain_net


if __name__ == "__main__":
    tyro.cli(main)
