"""Which corpus to trust: weights of two corpora in Hugging Face's Trainer, LoRA by peft.

    pip install -e ".[examples,integrations]"
    python examples/integrations/hf_trainer_lora.py

Without the lines marked `# bilevel`, and with those after `# plain:` in their place, it is the
plain program, whose adapters are the same to the bit as long as φ stays.

A tiny GPT-2, randomly initialised, nothing downloaded. Half of its texts count upwards, half
downwards; the validation texts count upwards. Attention stays fused, which has no second
derivative, so products are differences of gradients: `curvature=FiniteDifference()`.
"""

from __future__ import annotations

from typing import Any

import torch
import tyro
from _digits import SampleWeights
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import Adam, AdamW
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from hyperopt_torch import BilevelOptimizer, FiniteDifference  # bilevel

VOCABULARY, LENGTH = 32, 16


def texts(count: int, corpus: int) -> list[dict[str, Tensor]]:
    """(LENGTH,) tokens each: corpus 0 counts upwards from anywhere, corpus 1 downwards."""
    g = torch.Generator().manual_seed(corpus)
    starts = torch.randint(VOCABULARY, (count, 1), generator=g)
    rows = (starts + (1 - 2 * corpus) * torch.arange(LENGTH)) % VOCABULARY
    return [{"input_ids": row, "corpus": torch.tensor(corpus)} for row in rows]


def loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """(B,) mean loss of the tokens of each text."""
    ids = inputs["input_ids"]
    logits = model(input_ids=ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none").mean(1)


def main(steps: int = 150) -> nn.Module:
    """Train adapters while learning which corpus to trust.

    Args:
        steps: of AdamW.
    """
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=32, n_layer=1, n_head=2)
    lora = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], modules_to_save=["wte"])
    net = get_peft_model(GPT2LMHeadModel(config), lora)
    opt = AdamW([p for p in net.parameters() if p.requires_grad], lr=3e-2)
    val = {"input_ids": torch.stack([text["input_ids"] for text in texts(64, 0)])}
    share = SampleWeights(2)  # bilevel
    bilevel = BilevelOptimizer(opt, Adam([share.phi], 0.1), curvature=FiniteDifference())  # bilevel
    history: list[Tensor] = []

    class CorpusTrainer(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Any:
            # plain: return loss(model, inputs).mean()
            return bilevel.record(lambda: share(inputs["corpus"]) * loss(model, inputs))  # bilevel

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            # plain: history.append(loss(net.eval(), val).mean().detach())
            history.append(bilevel.outer_step(loss(net.eval(), val).mean()))  # bilevel

    arguments = TrainingArguments(
        output_dir="results/hf_trainer_lora",
        max_steps=steps,
        per_device_train_batch_size=16,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
    )
    train = [*texts(256, 0), *texts(256, 1)]
    CorpusTrainer(
        net, arguments, train_dataset=train, optimizers=(opt, None), callbacks=[Watch()]
    ).train()
    print(f"validation loss, first step   {float(history[0]):.3f}")
    print(f"validation loss, last step    {float(history[-1]):.3f}")
    return net


if __name__ == "__main__":
    tyro.cli(main)
