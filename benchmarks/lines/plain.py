"""The plain loop beside examples/first_loop.py: the same data, model and optimizer."""

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
batches = DataLoader(TensorDataset(x[train], given), 120, shuffle=True)

model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4)


def train_loss(xb, yb):
    return F.cross_entropy(model(xb), yb)


for _ in range(60):
    for xb, yb in batches:
        optimizer.zero_grad()
        train_loss(xb, yb).backward()
        optimizer.step()

print(f"test accuracy {(model(x[test]).argmax(1) == y[test]).float().mean():.3f}")
