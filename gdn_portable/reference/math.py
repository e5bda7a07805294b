# SPDX-License-Identifier: Apache-2.0
"""The maths of one token, in float32 or float64.

Every result depends on its own row alone, whatever the batch around it: sums run over one head,
and of the elementwise functions only those are used that round the same everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_portable.reference.slots import finish
from gdn_portable.spec import GdnSpec


def gating(
    spec: GdnSpec, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Return g and beta."""
    dtype = spec.compute_dtype
    g = -A_log.to(dtype).exp() * softplus(a.to(dtype) + dt_bias.to(dtype))
    return g, sigmoid(b.to(dtype))


def softplus(x: Tensor) -> Tensor:
    """Return log(1 + exp(x)), and x itself above 20."""
    return torch.where(x > 20, x, x.clamp(max=20).exp().log1p())


def sigmoid(x: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-x))."""
    # torch.sigmoid rounds differently in the last elements of a tensor than before them, which
    # would make a row's result depend on its neighbours; exp does not
    return 1 / (1 + (-x).clamp(max=80).exp())


def silu(x: Tensor) -> Tensor:
    """Return x * sigmoid(x)."""
    return torch.where(x < -80, 0, x / (1 + (-x).clamp(max=80).exp()))


def normalise(spec: GdnSpec, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and k [..., HV, K]: normalised, q scaled, each head repeated for its value heads."""
    q, k = (x.to(spec.compute_dtype) / norm(spec, x) for x in (q, k))
    ratio = spec.num_v_heads // spec.num_k_heads
    q, k = (x.repeat_interleave(ratio, dim=-2) for x in (q * spec.q_scale, k))
    return q, k


def norm(spec: GdnSpec, x: Tensor) -> Tensor:
    """Return what q or k [..., K] is divided by, [..., 1]: ones where the layer does not."""
    squares = x.to(spec.compute_dtype).square().sum(-1, keepdim=True)
    return (squares + 1e-6).sqrt() if spec.qk_l2norm else torch.ones_like(squares)


def update(S: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the states [B, HV, V, K] after one token, and what it writes under its key."""
    S = g.exp()[..., None, None] * S
    u = beta[..., None] * (v - read_out(S, k))
    return S + u[..., :, None] * k[..., None, :], u


def read_out(S: Tensor, x: Tensor) -> Tensor:
    """Return S x for states [..., V, K] and vectors [..., K]."""
    return (S * x[..., None, :]).sum(-1)


def gated_rms_norm(
    spec: GdnSpec,
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    out: Tensor | None = None,
) -> Tensor:
    """Normalise over V and gate."""
    if gate.dim() == 2:
        gate = gate.unflatten(-1, x.shape[-2:])
    dtype = spec.compute_dtype
    activation = silu if spec.gate_activation == "silu" else sigmoid
    values = x.to(dtype)
    values = values / (values.square().mean(-1, keepdim=True) + eps).sqrt() * weight.to(dtype)
    values = values * activation(gate.to(dtype))
    return finish(values, (x != 0).any(-1), x.dtype, out)
