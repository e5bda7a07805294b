# SPDX-License-Identifier: Apache-2.0
"""Verify batches that the CuTe kernel serves, as cases of the conformance suite."""

from __future__ import annotations

from typing import Any

import torch

from gdn_portable import GdnParams, GdnSpec, Op, ReplayDrafts, StatePool, VerifyMetadata
from gdn_portable.testing import Case

P = 4
SPARE = 3  # slots of nobody

SPEC = GdnSpec(
    num_k_heads=2,
    num_v_heads=4,
    head_k_dim=128,
    head_v_dim=128,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
)


def replay_case(
    spec: GdnSpec,
    B: int,
    *,
    bias: bool = False,
    ties: bool = False,
    fresh: bool = False,
    gate: bool = False,
    P: int = P,
    room: int | None = None,
    seed: int = 0,
) -> Case:
    """Return chains with every count of pending drafts, some padded, and strides of all sorts.

    Args:
        spec: the layer.
        B: sequences, the third one padded.
        bias: give the convolution one, and ``dt_bias`` in float32.
        ties: repeat tokens, and let decays be strong or none.
        fresh: give no counts, which is none pending; slots are int32.
        gate: end with the gated norm.
        P: drafts of a sequence.
        room: for drafts that are pending; None as many.
        seed: of all numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    H, HV, K, V, D = (
        spec.num_k_heads, spec.num_v_heads, spec.head_k_dim, spec.head_v_dim, spec.conv_dim,
    )  # fmt: skip
    slots, dtype, room = B + SPARE, spec.dtype, room or P

    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    indices = torch.zeros(B, 2, dtype=torch.int64)
    indices[:, 0] = torch.randperm(slots, generator=generator)[:B]
    indices[2, 0] = spec.pad_slot
    live = indices[indices[:, 0] > spec.pad_slot, 0]
    mixed = normal(B * P, D + 16)[:, :D]
    a, b = normal(B * P, 2 * HV)[:, ::2], normal(B * P, 2 * HV)[:, 1::2]
    if ties:
        for t in range(1, min(P, 3)):
            mixed[t::P] = mixed[::P]
        a *= 40
    params = GdnParams(
        conv_weight=normal(D, spec.conv_width) * 0.5,
        A_log=uniform(HV, low=0.01, high=16.0).log(),
        dt_bias=uniform(HV).to(torch.float32 if bias else dtype),
        conv_bias=normal(D) if bias else None,
        norm_weight=normal(V),
    )
    pool = StatePool.allocate(spec, slots, "cpu", paged=True)
    assert pool.conv_state is not None and pool.state is not None
    drafts = ReplayDrafts.allocate(spec, slots, room, "cpu")
    drafts.k, drafts.v = normal(slots, room, H, K), normal(slots, room, HV, V)
    drafts.g, drafts.beta = -uniform(slots, room, HV, high=2.0), uniform(slots, room, HV)
    drafts.conv_inputs = normal(slots, room, D)
    for tensor in (pool.conv_state, pool.state):
        tensor.fill_(torch.nan)
        tensor[live] = normal(len(live), *tensor.shape[1:], dtype=tensor.dtype)
    metadata = VerifyMetadata(indices[:, 0], P, num_accepted=torch.arange(B) % (room + 1))
    if fresh:
        metadata = VerifyMetadata(indices[:, 0].int(), P)
    arguments: dict[str, Any] = {
        "mixed_qkv": mixed,
        "a": a,
        "b": b,
        "params": params,
        "pool": pool,
        "metadata": metadata,
        "drafts": drafts,
        "gate": normal(B * P, HV, V) if gate else None,
        "out": torch.full((B * P, HV, V), torch.nan, dtype=dtype),
    }
    return Case("verify of chains of 4 by replay", Op.VERIFY_STEP, spec, arguments)
