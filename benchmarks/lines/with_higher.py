"""The first program with higher: the outer step looks one inner step ahead, on a copy."""

import higher
import torch
import torch.nn.functional as F
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


def train_loss(net, xb, yb, i):
    return (trust[i].sigmoid() * F.cross_entropy(net(xb), yb, reduction="none")).mean()


for _ in range(60):
    for step, (xb, yb, i) in enumerate(batches):
        if step % 5 == 4:
            with higher.innerloop_ctx(model, optimizer) as (ahead, inner):
                inner.step(train_loss(ahead, xb, yb, i))
                xv, yv = next(iter(val_batches))
                outer.zero_grad()
                F.cross_entropy(ahead(xv), yv).backward()
                outer.step()
        optimizer.zero_grad()
        train_loss(model, xb, yb, i).backward()
        optimizer.step()

print(f"test accuracy {(model(x[test]).argmax(1) == y[test]).float().mean():.3f}")
print("mean weight of right, wrong labels:")
print(trust[~wrong].sigmoid().mean().item(), trust[wrong].sigmoid().mean().item())
