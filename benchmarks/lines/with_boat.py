"""The first program with BOAT: five steps on one batch, and back through them, by settings."""

import boat_torch as boat
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
optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4)


class Trust(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.logit = torch.nn.Parameter(torch.zeros(1200))

    def forward(self, losses, i):
        return (self.logit[i].sigmoid() * losses).mean()


def train_loss(feed, weights, model, **kwargs):
    losses = F.cross_entropy(model(feed["x"], **kwargs), feed["y"], reduction="none")
    return weights(losses, feed["i"])


def val_loss(feed, weights, model, **kwargs):
    return F.cross_entropy(model(feed["x"], **kwargs), feed["y"])


weights = Trust()
settings = {
    "fo_op": None,
    "gm_op": ["NGD"],
    "na_op": ["RAD"],
    "lower_level_model": model,
    "upper_level_model": weights,
    "lower_level_var": list(model.parameters()),
    "upper_level_var": list(weights.parameters()),
    "lower_level_opt": optimizer,
    "upper_level_opt": torch.optim.Adam(weights.parameters(), lr=0.1),
    "lower_iters": 5,
    "device": "cpu",
    "return_grad": False,
    "accumulate_grad": False,
    "copy_last_param": True,
    "loss_log_path": "loss_log.json",
    "GDA": {"alpha_init": 0.0, "alpha_decay": 0.9},
    "RGT": {"truncate_iter": 0},
    "CG": {"k": 10, "tolerance": 1e-10},
}
losses = {
    "lower_level_loss": {"function": "__main__.train_loss"},
    "upper_level_loss": {"function": "__main__.val_loss"},
}
problem = boat.Problem(settings, losses)
problem.build_ll_solver()
problem.build_ul_solver()
for step in range(12):
    for xb, yb, i in batches:
        xv, yv = next(iter(val_batches))
        problem.run_iter({"x": xb, "y": yb, "i": i}, {"x": xv, "y": yv}, step)
trust = weights.logit

print(f"test accuracy {(model(x[test]).argmax(1) == y[test]).float().mean():.3f}")
print("mean weight of right, wrong labels:")
print(trust[~wrong].sigmoid().mean().item(), trust[wrong].sigmoid().mean().item())
