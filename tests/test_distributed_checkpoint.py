"""torch.distributed.checkpoint into fresh objects: the run goes on bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hyperopt_torch import BilevelOptimizer

dcp = pytest.importorskip("torch.distributed.checkpoint")


def loop():
    torch.manual_seed(0)
    model, phi = nn.Linear(4, 1), torch.zeros(8, requires_grad=True)
    x, y = torch.randn(8, 4), torch.randn(8, 1)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    bo = BilevelOptimizer(inner, torch.optim.Adam([phi], lr=0.1))

    def step() -> None:
        bo.inner_step(lambda: (phi.exp() * (model(x) - y).square()[:, 0]).mean())
        bo.outer_step((model(x) - y).abs().mean())

    return model, phi, bo, step


@pytest.mark.filterwarnings("ignore")
def test_into_fresh_objects(tmp_path):
    """A tuple is saved whole: a fresh optimizer has no entries yet for its parts to go to."""
    model, phi, bo, step = loop()
    for _ in range(3):
        step()
    saved = {"model": model.state_dict(), "phi": phi.detach(), "bilevel": (bo.state_dict(),)}
    dcp.save(saved, checkpoint_id=str(tmp_path))
    other, psi, fresh, go_on = loop()
    found = {"model": other.state_dict(), "phi": psi.detach(), "bilevel": (fresh.state_dict(),)}
    dcp.load(found, checkpoint_id=str(tmp_path))
    other.load_state_dict(found["model"])
    fresh.load_state_dict(found["bilevel"][0])
    for _ in range(3):
        step()
        go_on()
    assert torch.equal(phi, psi)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
