"""First gradients at θ and beside it, by plain backward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ._graph import graph_dtypes, graph_leaves, graph_nodes
from ._tensors import FlatLayout, here, wide_dtype
from .recording import Evaluation, Restoring

# h, the step along x as a part of the size of θ, by the precision that f computes in.
STEPS = {torch.float64: 2e-6, torch.float32: 3e-3}
_COARSE_STEP = 0.05
_NOISE = 10.0  # rounding of ∇f counts this many times beside a difference


class PlainGradient:
    """∇f at θ ± εx, of f = s·Σ w_i f_i: nothing is differentiated twice, no graph is kept.

    Whatever trains works: compiled modules, fused attention, custom functions with a backward
    alone, DistributedDataParallel, reentrant checkpoints.

        ε = h / max_l(‖x_l‖ / t_l),    t_l = max(‖θ_l‖, 0.1·√rows_l) for each parameter tensor l

    so that every tensor moves by at most the part h of its own size, whatever the scale of f, θ
    and x.

    Args:
        terms: (w_i, function that evaluates f_i at whatever θ is, its graph alive).
        inner: the inner parameters θ, n entries in all.
        outer: the outer parameters φ, h entries in all.
        sign: s.
        scale: what f is multiplied by before it is differentiated, such as a GradScaler's scale.
        step: h; None: 2e-6 where f computes in float64, 0.003 in float32, 0.05 below.
        total: the sum over all entries of vectors from that over those of this process.
        settle: called whenever inner parameters were written to.

    Attributes:
        gradient: (n,) ∇f at θ.
        loss: f at θ.
        reached: for each outer parameter, whether f depends on it.
        precision: machine epsilon of the coarsest dtype that f is known to compute in, where it is
            coarser than that of the vectors.

    Raises:
        RuntimeError: f depends on no inner parameter, or parameters are stored in half precision.

    Cost: one gradient of f, and two a product; 2n entries of memory, the graph of one gradient.
    """

    def __init__(
        self,
        terms: Sequence[tuple[float, Callable[[], Evaluation]]],
        inner: Sequence[Tensor],
        outer: Sequence[Tensor],
        *,
        sign: float = 1.0,
        scale: Tensor | float = 1.0,
        step: float | None = None,
        total: Callable[[Tensor], Tensor] = lambda part: part,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self._total, self._settle = total, settle
        self._terms, self.inner, self.outer = list(terms), list(inner), list(outer)
        self._sign, self._scale = sign, scale
        self.layout, self.outer_layout = FlatLayout(self.inner), FlatLayout(self.outer)
        _check_precision(self.inner)
        self._theta = [here(p.detach()).clone() for p in self.inner]
        least = torch.stack([smallest_size(p) for p in self.inner])
        self._sizes = torch.maximum(self._lengths(self._theta), least.to(self.layout.dtype))
        self._dtypes = set(self.layout.dtypes)
        self.reached = [False] * len(self.outer)
        self.loss = torch.zeros((), device=self.layout.device)
        self.gradient, _ = self._gradients(first=True)
        coarsest = max(self._dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        self.step = STEPS.get(coarsest, _COARSE_STEP) if step is None else step
        eps = torch.finfo(coarsest).eps
        self.precision = eps if eps > torch.finfo(self.layout.dtype).eps else None
        self._rounding = _NOISE * eps * self._lengths([self.gradient])[0]
        self._bends: list[Tensor] = []  # ‖g₊ + g₋ - 2g₀‖², ‖g₊ - g₋‖² of each product, our part

    @property
    def kink(self) -> Tensor:
        """The largest ‖g₊ + g₋ - 2g₀‖ / ‖g₊ - g₋‖ of the products so far, g the gradients at
        θ ± εx and at θ: 0.8 to 1 where f has kinks.
        """
        if not self._bends:
            return torch.zeros_like(self._rounding)
        bend, apart = self._total(torch.stack(self._bends)).sqrt().to(self._rounding).unbind(1)
        length = apart + self._rounding
        return (bend / torch.where(length > 0, length, 1.0)).amax()

    def differences(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(Hx, Jᵀx) ≈ (∇f(θ + εx) - ∇f(θ - εx)) / 2ε over θ and over φ: (n,) -> (n,), (h,)."""
        parts = self.layout.unflatten(x)
        longest = (self._lengths(parts) / self._sizes).amax()
        epsilon = torch.where(longest > 0, self.step / longest, 1.0)
        with self._beside(parts, epsilon, 1.0):
            plus, cross_plus = self._gradients()
        with self._beside(parts, epsilon, -1.0):
            minus, cross_minus = self._gradients()
        bend = (plus + minus).sub_(self.gradient, alpha=2)
        apart = plus.sub_(minus)
        self._bends.append(_squares([bend, apart]))
        width = 2 * epsilon
        return apart.div_(width), (cross_plus - cross_minus) / width.to(cross_plus.dtype)

    @contextmanager
    def _beside(self, parts: Sequence[Tensor], epsilon: Tensor, side: float) -> Iterator[None]:
        """Inside θ is θ ± εx, in its own memory; outside it is θ again, bit for bit.

        Written past the version counters: graphs that hold θ, such as that of the validation loss,
        stay good, and so do compiled code and buckets that hold its address.
        """
        with Restoring() as present:
            present.finally_do(self._put_back)
            for p, theta, part in zip(self.inner, self._theta, parts, strict=True):
                torch.addcmul(theta, part, epsilon.to(p.dtype), value=side, out=here(p.data))
            self._settle()
            yield

    def _put_back(self) -> None:
        for p, theta in zip(self.inner, self._theta, strict=True):
            here(p.data).copy_(theta)
        self._settle()

    def _lengths(self, tensors: Sequence[Tensor]) -> Tensor:
        """The norm of each tensor, all of it."""
        return self._total(_squares(tensors)).sqrt().to(self.layout.dtype)

    def _gradients(self, first: bool = False) -> tuple[Tensor, Tensor]:
        """(∇_θ f, ∇_φ f) where θ is now."""
        theta: Tensor | None = None
        phi: Tensor | None = None
        for weight, evaluate in self._terms:
            with torch.enable_grad():
                loss = evaluate().loss
                if first:
                    self._dtypes |= floating_dtypes(loss)
                factor = self._sign * weight * self._scale
                grads = plain_gradients(loss * factor, [*self.inner, *self.outer])
                split = len(self.inner)
                part = _flat(self.layout, grads[:split])
                cross = _flat(self.outer_layout, grads[split:])
                theta = part if theta is None else theta + part
                phi = cross if phi is None else phi + cross
            if first:
                self._note(loss, weight, grads)
        assert theta is not None
        assert phi is not None
        if isinstance(self._scale, Tensor) or self._scale != 1:
            theta, phi = theta / self._scale, phi / self._scale
        return theta, phi

    def _note(
        self,
        loss: Tensor,
        weight: float,
        grads: Sequence[Tensor | None],
    ) -> None:
        split = len(self.inner)
        if all(g is None for g in grads[:split]):
            raise RuntimeError(
                "The training loss depends on none of the inner parameters: does the inner "
                "optimizer hold the parameters of the model that the closure calls?"
            )
        self.loss = self.loss + weight * loss.detach()
        pairs = zip(self.reached, grads[split:], strict=True)
        self.reached = [known or g is not None for known, g in pairs]


def _flat(layout: FlatLayout, grads: Sequence[Tensor | None]) -> Tensor:
    flat = layout.flatten(grads)
    # Of one tensor it may be the gradient itself, and that a part of a bucket.
    return flat.clone() if len(grads) == 1 else flat


def size_of(parameter: Tensor) -> Tensor:
    """max(‖θ‖, √rows / 10): what a step of a tensor is measured by, also where it is zero."""
    own = torch.linalg.vector_norm(parameter.detach())
    return torch.maximum(own, smallest_size(parameter).to(own))


def smallest_size(parameter: Tensor) -> Tensor:
    rows = parameter.shape[0] if parameter.ndim > 1 else 1
    return torch.full((), 0.1 * rows**0.5, device=parameter.device)


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    """Σ t² of each tensor, in a dtype where it does not underflow."""
    lengths = torch.stack([torch.linalg.vector_norm(t) for t in tensors])
    return lengths.to(wide_dtype(lengths)).square()


def floating_dtypes(loss: Tensor) -> set[torch.dtype]:
    """Those that its graph is known to compute in."""
    return {dtype for dtype in graph_dtypes(graph_nodes(loss)) if dtype.is_floating_point}


def plain_gradients(
    loss: Tensor, tensors: Sequence[Tensor], retain_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """∂loss/∂t for each leaf, None where nothing arrived, by ``loss.backward()``.

    It reaches what ``torch.autograd.grad`` does not: the parameters that a reentrant checkpoint
    hides, and hooks that reduce gradients over processes. Every ``.grad`` is as found afterwards.
    """
    with own_grads([*tensors, *graph_leaves(graph_nodes(loss))]):
        loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
        return tuple(t.grad for t in tensors)


@contextmanager
def own_grads(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Inside no ``.grad``; outside the same objects again, with the same values.

    Where gradients are views of a bucket, as DistributedDataParallel can make them, what is
    computed inside is written to the memory of the old ones.
    """
    unique = list({id(t): t for t in tensors}.values())
    with Restoring() as present:
        for t in unique:
            _keep_grad(present, t)
            t.grad = None
        yield


def _keep_grad(present: Restoring, tensor: Tensor) -> None:
    own = tensor.grad
    shared = own is not None and own.layout is torch.strided and _is_part(own)
    values = own.detach().clone() if own is not None and shared else None

    def back() -> None:
        tensor.grad = own
        if own is not None and values is not None:
            own.data.copy_(values)

    present.finally_do(back)


def _is_part(grad: Tensor) -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed or grad.untyped_storage().nbytes() > grad.numel() * grad.element_size()


def _check_precision(inner: Sequence[Tensor]) -> None:
    half = {p.dtype for p in inner if torch.finfo(p.dtype).eps > 1e-4}
    if half:
        names = ", ".join(sorted(str(dtype) for dtype in half))
        raise RuntimeError(
            f"Inner parameters are stored in {names}: a step along x is lost in their rounding. "
            "Keep them in float32 and compute in half precision under torch.autocast."
        )
