"""Law: float16 on the way to a loss costs digits, not the answer, whatever the scale of the loss.

Every product is held against that of the same loss in float32.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperopt_torch import GaussNewton, Hessian
from hyperopt_torch.operators import InnerGradient

TOLERANCE = 2e-2  # eight layers of rounding to three digits


def mlp() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 3)]
    return nn.Sequential(*layers), torch.randn(24, 16)


def normalised() -> tuple[nn.Module, Tensor]:
    """Batch norm: the second derivative is large where the first is not."""
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 8, 3)]
    layers += [nn.BatchNorm2d(8), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 3)), torch.randn(24, 3, 8, 8)


class Rig:
    """A weighted classification loss, times ``size``, computed in float32 or under autocast."""

    def __init__(self, make=mlp, size: float = 1.0) -> None:
        torch.manual_seed(0)
        self.model, self.x = make()
        self.size, self.y = size, torch.randint(3, (24,))
        self.inner = list(self.model.parameters())
        self.phi = torch.linspace(-0.5, 0.5, 24, requires_grad=True)

    def gradient(self, dtype: torch.dtype | None, scale: Tensor | float = 1.0) -> InnerGradient:
        with torch.autocast("cpu", dtype=dtype or torch.float16, enabled=dtype is not None):
            o = self.model(self.x)
        losses = F.cross_entropy(o.float(), self.y, reduction="none")
        loss = self.size * (self.phi.exp() * losses).mean()
        return InnerGradient(loss, self.inner, [self.phi], o, scale)

    def vectors(self) -> dict[str, Tensor]:
        gradient = self.gradient(None)
        n = gradient.layout.n
        noise = torch.randn(n)
        heavy = noise / torch.randn(n)  # a few entries are a thousand times the others
        unit = torch.zeros(n).index_fill_(0, torch.tensor(n // 2), 1.0)
        return {"noise": noise, "gradient": gradient.gradient, "heavy": heavy, "unit": unit}


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


SCALES = {
    "none": 1.0,
    "GradScaler's first": torch.tensor(65536.0),
    "too large": torch.tensor(2.0**40),  # one that has grown once too often, and far more
    "too small": torch.tensor(1.0),
}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("size", [100.0, 1.0, 1e-4, 1e-6])
@pytest.mark.parametrize("make", [mlp, normalised])
def test_products_in_float16(make, size, scale):
    rig = Rig(make, size)
    plain, half = rig.gradient(None), rig.gradient(torch.float16, scale)
    assert error(half.gradient, plain.gradient) < TOLERANCE
    for x in rig.vectors().values():
        for factor in (1.0, 1e-12, 1e12):
            Hx, cross = half.joint(factor * x)
            expected = plain.joint(x)
            assert error(Hx / factor, expected[0]) < TOLERANCE
            assert error(cross / factor, expected[1]) < TOLERANCE


@pytest.mark.parametrize("curvature", [Hessian, GaussNewton])
@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_every_kind_of_product(curvature, size):
    """Each column of a batch has a scale of its own."""
    rig = Rig(size=size)
    X = torch.stack(list(rig.vectors().values()), 1) * torch.tensor([1.0, 1e-6, 1e6, 1e-12])
    plain = curvature().operator(rig.gradient(None))
    for chunk in (1, None):
        half = curvature(chunk).operator(rig.gradient(torch.float16))
        for found, expected in zip((half @ X).mT, (plain @ X).mT, strict=True):
            assert error(found, expected) < TOLERANCE
    for x in X.mT:
        found, expected = half.joint(x), plain.joint(x)
        assert error(found[0], expected[0]) < TOLERANCE
        assert error(found[1], expected[1]) < TOLERANCE
        cross = rig.gradient(torch.float16).cross(x)
        assert error(cross, expected[1]) < TOLERANCE


def test_float16_parameters():
    rig = Rig()
    expected = rig.gradient(None).joint(torch.ones(rig.gradient(None).layout.n))
    rig.model.half()
    rig.x = rig.x.half()
    half = rig.gradient(None)
    assert half.precision == torch.finfo(torch.float16).eps
    for found, known in zip(half.joint(torch.ones(half.layout.n)), expected, strict=True):
        assert found.dtype == torch.float32
        assert error(found, known) < TOLERANCE


def test_scaling_rounds_nothing():
    """Powers of two: a vector 2^k times as long gives the same digits."""
    half = Rig().gradient(torch.float16)
    x = torch.randn(half.layout.n)
    for k in (-40, -1, 3, 40):
        for found, expected in zip(half.joint(x * 2.0**k), half.joint(x), strict=True):
            assert torch.equal(found / 2.0**k, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(value):
    rig = Rig()
    half = rig.gradient(torch.float16)
    x = torch.zeros(half.layout.n)
    assert all(torch.equal(part, torch.zeros_like(part)) for part in half.joint(x))
    x[3] = value
    assert not half.joint(x)[0].isfinite().all()
    assert not half.joint(x)[1].isfinite().all()
    rig.size = value
    broken = rig.gradient(torch.float16)
    assert not broken.gradient.isfinite().any()
    assert not broken.joint(torch.ones_like(x))[0].isfinite().any()


def test_precision_is_that_of_the_coarsest_dtype():
    rig = Rig()
    assert rig.gradient(None).precision is None
    for dtype in (torch.float16, torch.bfloat16):
        assert rig.gradient(dtype).precision == torch.finfo(dtype).eps
    rig.model.double()
    rig.x = rig.x.double()
    mixed = rig.gradient(None)  # the loss itself is computed in float32
    assert mixed.layout.dtype == torch.float64
    assert mixed.precision == torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_range_of_float32_needs_no_scaling(dtype):
    """Vectors enter as they are; a scale that is given makes no difference."""
    rig = Rig()
    plain, scaled = rig.gradient(dtype), rig.gradient(dtype, torch.tensor(1024.0))
    x = torch.randn(plain.layout.n)
    assert plain.lift(x) == (x, None)
    assert plain.scaled_loss.grad_fn is plain.nodes[0]
    assert torch.equal(plain.gradient, scaled.gradient)
    for found, expected in zip(scaled.joint(x), plain.joint(x), strict=True):
        assert torch.equal(found, expected)
