"""The first program with Betty: the engine owns the loop; its default is a finite difference."""

import torch
import torch.nn.functional as F
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
x = x.float() / 16
train, val, test = torch.randperm(len(x)).split([1200, 100, 497])
wrong = torch.rand(1200) < 0.4
given = torch.where(wrong, (y[train] + torch.randint(1, 10, (1200,))) % 10, y[train])
batches = DataLoader(TensorDataset(x[train], given, torch.arange(1200)), 120, shuffle=True)
val_batches = DataLoader(TensorDataset(x[val], y[val]), 100, shuffle=True)

model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4)


class Trust(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.logit = torch.nn.Parameter(torch.zeros(1200))

    def forward(self, i):
        return self.logit[i].sigmoid()


class Outer(ImplicitProblem):
    def training_step(self, batch):
        xv, yv = batch
        return F.cross_entropy(self.inner(xv), yv)


class Inner(ImplicitProblem):
    def training_step(self, batch):
        xb, yb, i = batch
        return (self.outer(i) * F.cross_entropy(self.module(xb), yb, reduction="none")).mean()


weights = Trust()
outer = Outer(
    "outer",
    Config(retain_graph=True),
    weights,
    torch.optim.Adam(weights.parameters(), lr=0.1),
    train_data_loader=val_batches,
)
inner = Inner("inner", Config(unroll_steps=5), model, optimizer, train_data_loader=batches)
engine = Engine(
    [outer, inner],
    EngineConfig(train_iters=600, strategy="cpu"),
    {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
)
engine.run()
trust = weights.logit

print(f"test accuracy {(model(x[test]).argmax(1) == y[test]).float().mean():.3f}")
print("mean weight of right, wrong labels:")
print(trust[~wrong].sigmoid().mean().item(), trust[wrong].sigmoid().mean().item())
