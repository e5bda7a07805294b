# SPDX-License-Identifier: Apache-2.0
"""Prefills long enough to be cut into segments, which start from nothing or not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gdn_portable import GdnSpec, PrefillMetadata
from tests.calls import Call
from tests.cases import generator, pool, qkv, slots

LONG = 640
# the log decay of a token; a state is dropped after 22: within a chunk of 64 tokens, two, three,
# and never
RATES = {"never": 1e-6, "three chunks": 0.13, "two chunks": 0.2, "one chunk": 0.4}


def long_prefill(spec: GdnSpec, *, repeated: bool = False) -> Call:
    """Return one whose four heads decay at the ``RATES``, of random keys or of one."""
    rng, rates = generator(), torch.tensor([*RATES.values()])
    q, k, v = qkv(spec, rng, LONG)
    k = k[:1].repeat(LONG, 1, 1) if repeated else k
    state = pool(spec, rng, 3, live=[2]).state
    g = -rates * (0.5 + torch.rand(LONG, spec.num_v_heads, generator=rng))
    beta = torch.full((LONG, spec.num_v_heads), 1 - 1e-5)
    metadata = PrefillMetadata(slots(0, LONG - 5), slots(2))
    return {"q": q, "k": k, "v": v, "g": g, "beta": beta, "state": state, "metadata": metadata}


def of_unit_keys(spec: GdnSpec) -> Call:
    """Return one whose q and k are unit vectors."""
    call = long_prefill(spec)
    return call | {name: F.normalize(call[name].float(), dim=-1).to(spec.dtype) for name in "qk"}


def of_growing_states(spec: GdnSpec) -> Call:
    """Return one in which keys make up for what decay took before the second segment.

    Nothing is written from the 128th token on; 16 of the tokens behind it multiply what the first
    key reads by -4 each, in the chunk that the second segment warms up from.
    """
    call = of_unit_keys(spec)
    first, second = torch.eye(spec.head_k_dim)[:2]
    call["k"][:] = first
    call["k"][128:] = second
    call["k"][208:224] = first * 5**0.5
    call["v"][128:] = 0
    return call


def assert_remembered(out: Tensor, expected: Tensor) -> None:
    """Compare what the second segment of growing states reads at first, where it warms up."""
    got, seen = (x[256:320, [*RATES].index("two chunks")] for x in (out, expected))
    assert seen.abs().max() > 1e-4
    torch.testing.assert_close(got, seen, rtol=1e-2, atol=1e-5)
