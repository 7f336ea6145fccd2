"""The first program with hypertorch: fixed-point iterations on the map of one gradient step."""

import torch
import torch.nn.functional as F
from hypergrad.diff_optimizers import GradientDescent
from hypergrad.hypergradients import fixed_point
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
names = [name for name, _ in model.named_parameters()]


def net(theta, xb):
    return torch.func.functional_call(model, dict(zip(names, theta, strict=True)), (xb,))


def train_loss(theta, phi, batch):
    xb, yb, i = batch
    return (phi[0][i].sigmoid() * F.cross_entropy(net(theta, xb), yb, reduction="none")).mean()


for _ in range(60):
    for step, batch in enumerate(batches):
        theta = list(model.parameters())
        optimizer.zero_grad()
        train_loss(theta, [trust], batch).backward()
        optimizer.step()
        if step % 5 == 4:
            xv, yv = next(iter(val_batches))
            outer.zero_grad()
            fixed_point(
                theta,
                [trust],
                10,
                GradientDescent(train_loss, 0.2, batch),
                lambda theta, phi: F.cross_entropy(net(theta, xv), yv),
            )
            outer.step()

print(f"test accuracy {(model(x[test]).argmax(1) == y[test]).float().mean():.3f}")
print("mean weight of right, wrong labels:")
print(trust[~wrong].sigmoid().mean().item(), trust[wrong].sigmoid().mean().item())
