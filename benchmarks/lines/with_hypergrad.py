"""The first program with hypergrad (Hataya): ten Neumann terms, by a function of two losses."""

import functorch
import torch
import torch.nn.functional as F
from hypergrad.approx_hypergrad import neumann
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
trust = torch.nn.Parameter(torch.zeros(1200))
optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4)
outer = torch.optim.Adam([trust], lr=0.1)
net, _ = functorch.make_functional(model)


def train_loss(theta, phi, xb, yb, i):
    return (phi[0][i].sigmoid() * F.cross_entropy(net(theta, xb), yb, reduction="none")).mean()


for _ in range(60):
    for step, (xb, yb, i) in enumerate(batches):
        optimizer.zero_grad()
        train_loss(tuple(model.parameters()), (trust,), xb, yb, i).backward()
        optimizer.step()
        if step % 5 == 4:
            xv, yv = next(iter(val_batches))
            (trust.grad,) = neumann(
                lambda theta, phi: train_loss(theta, phi, xb, yb, i),
                lambda theta, phi: F.cross_entropy(net(theta, xv), yv),
                tuple(p.detach() for p in model.parameters()),
                (trust.detach(),),
                num_iters=10,
                lr=0.1,
            )
            outer.step()

print(f"test accuracy {(model(x[test]).argmax(1) == y[test]).float().mean():.3f}")
print("mean weight of right, wrong labels:")
print(trust[~wrong].sigmoid().mean().item(), trust[wrong].sigmoid().mean().item())
