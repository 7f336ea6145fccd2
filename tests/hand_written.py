"""Inner optimizers by hand: an oracle that shares no code with ``torch.optim``.

Each ``step(theta, state, grad, hyper) -> (theta, state)`` is written from the published formulas,
in the form of torch's documentation. The steps are pure, so plain autograd differentiates them in
θ, in the state and in every hyperparameter that is a tensor. A fresh state is ``{}``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]
Hyper = Mapping[str, Any]
Step = Callable[[Tensor, State, Tensor, Hyper], tuple[Tensor, State]]


def root(x: Tensor) -> Tensor:
    """√x, with derivative 0 where x = 0: there a second moment stays zero."""
    return torch.where(x > 0, torch.where(x > 0, x, torch.ones_like(x)).sqrt(), 0.0)


def sgd(theta: Tensor, state: State, grad: Tensor, hyper: Hyper) -> tuple[Tensor, State]:
    """Momentum as in Sutskever et al. 2013, with torch's order of lr and buffer."""
    mu, tau = hyper.get("momentum", 0.0), hyper.get("dampening", 0.0)
    grad = grad + hyper.get("weight_decay", 0.0) * theta
    # The first buffer is the gradient itself, without dampening.
    buffer = mu * state["buffer"] + (1 - tau) * grad if "buffer" in state else grad
    if isinstance(mu, Tensor) or mu != 0:
        direction = grad + mu * buffer if hyper.get("nesterov") else buffer
    else:
        direction = grad
    return theta - hyper["lr"] * direction, {"buffer": buffer}


def _moments(state: State, grad: Tensor, hyper: Hyper) -> tuple[int, Tensor, Tensor]:
    beta1, beta2 = hyper["betas"]
    zero = torch.zeros_like(grad)
    m = beta1 * state.get("m", zero) + (1 - beta1) * grad
    v = beta2 * state.get("v", zero) + (1 - beta2) * grad**2
    return state.get("t", 0) + 1, m, v


def adam(theta: Tensor, state: State, grad: Tensor, hyper: Hyper) -> tuple[Tensor, State]:
    """Kingma & Ba 2015; with ``amsgrad`` Reddi et al. 2018."""
    beta1, beta2 = hyper["betas"]
    grad = grad + hyper.get("weight_decay", 0.0) * theta
    t, m, v = _moments(state, grad, hyper)
    new = {"t": t, "m": m, "v": v}
    if hyper.get("amsgrad"):
        new["largest"] = v = torch.maximum(state.get("largest", torch.zeros_like(v)), v)
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    return theta - hyper["lr"] * m_hat / (root(v_hat) + hyper["eps"]), new


def adamw(theta: Tensor, state: State, grad: Tensor, hyper: Hyper) -> tuple[Tensor, State]:
    """Loshchilov & Hutter 2019: the decay is no part of the gradient."""
    decayed = theta - hyper["lr"] * hyper["weight_decay"] * theta
    return adam(decayed, state, grad, {**hyper, "weight_decay": 0.0})


def rmsprop(theta: Tensor, state: State, grad: Tensor, hyper: Hyper) -> tuple[Tensor, State]:
    """Tieleman & Hinton 2012; ``centered`` as in Graves 2013."""
    alpha, mu = hyper["alpha"], hyper.get("momentum", 0.0)
    grad = grad + hyper.get("weight_decay", 0.0) * theta
    zero = torch.zeros_like(grad)
    v = alpha * state.get("v", zero) + (1 - alpha) * grad**2
    new = {"v": v}
    if hyper.get("centered"):
        new["mean"] = alpha * state.get("mean", zero) + (1 - alpha) * grad
        v = v - new["mean"] ** 2
    new["buffer"] = mu * state.get("buffer", zero) + grad / (root(v) + hyper["eps"])
    return theta - hyper["lr"] * new["buffer"], new


def adagrad(theta: Tensor, state: State, grad: Tensor, hyper: Hyper) -> tuple[Tensor, State]:
    """Duchi, Hazan & Singer 2011."""
    t = state.get("t", 0) + 1
    grad = grad + hyper.get("weight_decay", 0.0) * theta
    total = state.get("total", torch.zeros_like(grad)) + grad**2
    lr = hyper["lr"] / (1 + (t - 1) * hyper.get("lr_decay", 0.0))
    return theta - lr * grad / (root(total) + hyper["eps"]), {"t": t, "total": total}


def nadam(theta: Tensor, state: State, grad: Tensor, hyper: Hyper) -> tuple[Tensor, State]:
    """Dozat 2016, with the momentum schedule μ_t = β1 (1 - ½ · 0.96^(tψ))."""
    beta1, beta2 = hyper["betas"]
    grad = grad + hyper.get("weight_decay", 0.0) * theta
    t, m, v = _moments(state, grad, hyper)
    mu, mu_next = (
        beta1 * (1 - 0.5 * 0.96 ** (s * hyper.get("momentum_decay", 4e-3))) for s in (t, t + 1)
    )
    product = state.get("product", 1.0) * mu
    m_hat = mu_next * m / (1 - product * mu_next) + (1 - mu) * grad / (1 - product)
    v_hat = v / (1 - beta2**t)
    theta = theta - hyper["lr"] * m_hat / (root(v_hat) + hyper["eps"])
    return theta, {"t": t, "m": m, "v": v, "product": product}


def radam(theta: Tensor, state: State, grad: Tensor, hyper: Hyper) -> tuple[Tensor, State]:
    """Liu et al. 2020: without rectification while the variance is intractable (ρ_t <= 5)."""
    beta1, beta2 = hyper["betas"]
    grad = grad + hyper.get("weight_decay", 0.0) * theta
    t, m, v = _moments(state, grad, hyper)
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    direction = m / (1 - beta1**t)
    if rho > 5:
        r = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
        direction = direction * r * (1 - beta2**t) ** 0.5 / (root(v) + hyper["eps"])
    return theta - hyper["lr"] * direction, {"t": t, "m": m, "v": v}


def adamax(theta: Tensor, state: State, grad: Tensor, hyper: Hyper) -> tuple[Tensor, State]:
    """Kingma & Ba 2015, algorithm 2."""
    beta1, beta2 = hyper["betas"]
    grad = grad + hyper.get("weight_decay", 0.0) * theta
    t, m, _ = _moments(state, grad, hyper)
    u = torch.maximum(beta2 * state.get("u", torch.zeros_like(m)), grad.abs() + hyper["eps"])
    return theta - hyper["lr"] / (1 - beta1**t) * m / u, {"t": t, "m": m, "u": u}


def asgd(theta: Tensor, state: State, grad: Tensor, hyper: Hyper) -> tuple[Tensor, State]:
    """Polyak & Juditsky 1992, with the rates of Bottou: η_t = η_0 / (1 + λ η_0 t)^α.

    The average of the iterates, which ``t0`` is about, does not act on them. The next rate is part
    of the state, as in torch: where a window begins, it is given.
    """
    t, lr, decay = state.get("t", 0) + 1, hyper["lr"], hyper["lambd"]
    grad = grad + hyper.get("weight_decay", 0.0) * theta
    eta = state.get("eta", lr)
    following = lr / (1 + decay * lr * t) ** hyper["alpha"]
    return (1 - decay * eta) * theta - eta * grad, {"t": t, "eta": following}


def adadelta(theta: Tensor, state: State, grad: Tensor, hyper: Hyper) -> tuple[Tensor, State]:
    """Zeiler 2012."""
    rho, eps = hyper["rho"], hyper["eps"]
    grad = grad + hyper.get("weight_decay", 0.0) * theta
    zero = torch.zeros_like(grad)
    v = rho * state.get("v", zero) + (1 - rho) * grad**2
    u = state.get("u", zero)
    delta = (u + eps).sqrt() / (v + eps).sqrt() * grad
    return theta - hyper["lr"] * delta, {"v": v, "u": rho * u + (1 - rho) * delta**2}


def rprop(theta: Tensor, state: State, grad: Tensor, hyper: Hyper) -> tuple[Tensor, State]:
    """Riedmiller & Braun 1993, without weight backtracking; ``lr`` is the first step size."""
    (shrink, grow), (smallest, largest) = hyper["etas"], hyper["step_sizes"]
    size = state.get("size", hyper["lr"] * torch.ones_like(grad))
    turn = torch.sign(grad * state.get("before", torch.zeros_like(grad)))
    size = torch.where(turn > 0, size * grow, torch.where(turn < 0, size * shrink, size))
    size = size.clamp(smallest, largest)
    grad = torch.where(turn < 0, torch.zeros_like(grad), grad)
    return theta - torch.sign(grad) * size, {"size": size, "before": grad}


def unroll(
    step: Step,
    theta: Sequence[Tensor],
    losses: Sequence[Callable[[Sequence[Tensor]], Tensor]],
    hyper: Sequence[Hyper | Sequence[Hyper]],
    states: Sequence[State] | None = None,
) -> tuple[list[Tensor], list[State]]:
    """(θ, states) after one step for each loss, the whole graph kept.

    Args:
        hyper: for each tensor: one setting for all steps, or a list with one for each step.
    """
    now = [p if p.requires_grad else p.clone().requires_grad_() for p in theta]
    known = [dict(s) for s in states] if states else [{} for _ in now]
    for t, loss in enumerate(losses):
        grads = torch.autograd.grad(loss(now), now, create_graph=True, allow_unused=True)
        for i, (p, g, setting) in enumerate(zip(list(now), grads, hyper, strict=True)):
            if g is not None:  # torch's optimizers leave the others alone, state included
                setting = setting if isinstance(setting, Mapping) else setting[t]
                now[i], known[i] = step(p, known[i], g, setting)
    return now, known
