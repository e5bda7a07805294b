# SPDX-License-Identifier: Apache-2.0
"""Calls of FlashInfer on a GPU: as its documentation has them, and through the adapters."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from gdn_backend_cuda.flashinfer_probe import DISTRIBUTION
from gdn_backend_cuda.probe import is_older
from torch import Tensor

from gdn_portable import (
    GdnOps,
    GdnSpec,
    Op,
    SnapshotDrafts,
    VerifyMetadata,
    bind,
)
from gdn_portable.testing import SLOTS

H, HV, K = 2, 4, 128
SPEC = GdnSpec(
    num_k_heads=H,
    num_v_heads=HV,
    head_k_dim=K,
    head_v_dim=K,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
    scratch_slot=SLOTS,
)
UNIT = replace(SPEC, qk_l2norm=False)
STATES = {"float32": SPEC, "bfloat16": replace(SPEC, state_dtype=torch.bfloat16)}
DECODE, VERIFY, CHUNK, CHUNK_CP = (
    "flashinfer.recurrent_decode",
    "flashinfer.mtp_verify",
    "flashinfer.chunk_prefill",
    "flashinfer.chunk_prefill_cp",
)
KERNELS = {
    "flashinfer.recurrent_decode": Op.RECURRENT_DECODE,
    "flashinfer.mtp_verify": Op.MTP_VERIFY,
    "flashinfer.chunk_prefill": Op.CHUNK_PREFILL,
    CHUNK_CP: Op.CHUNK_PREFILL,
    "flashinfer.prefill_step": Op.PREFILL_STEP,
    "flashinfer.prefill_step_cp": Op.PREFILL_STEP,
}


def is_mended(*release: int) -> bool:
    """Return whether FlashInfer is of a release whose sources no longer have a mistake."""
    return is_older(DISTRIBUTION, release) is None


@cache
def bound(spec: GdnSpec, *kernels: str) -> GdnOps:
    """Return the ops with FlashInfer's kernels for those named."""
    return bind(spec, "cuda", kernels={KERNELS[kernel]: kernel for kernel in kernels})


def index(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Return slots."""
    return torch.tensor(values, dtype=dtype, device="cuda")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return normally distributed numbers."""
    rng = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=rng, device="cuda").to(dtype)


class Rows(NamedTuple):
    """What decode and verify take for T rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    A_log: Tensor
    dt_bias: Tensor


def rows_of(T: int, spec: GdnSpec = SPEC) -> Rows:
    """Return T rows of a layer."""
    heads, width = spec.num_v_heads, spec.head_k_dim
    zeros = torch.zeros(heads, device="cuda")
    q, k = normal(2, T, spec.num_k_heads, width, seed=1)
    a, b = normal(2, T, heads, seed=2)
    return Rows(q, k, normal(T, heads, width, seed=3), a, b, zeros, zeros)


def states_of(spec: GdnSpec, slots: int = SLOTS + 1) -> Tensor:
    """Return a pool, the same at every call."""
    shape = (spec.num_v_heads, spec.head_v_dim, spec.head_k_dim)
    return normal(slots, *shape, seed=4, dtype=spec.state_dtype)


def _grouped(rows: Rows, T: int) -> dict[str, Tensor]:
    grouped = {
        name: getattr(rows, name).unflatten(0, (-1, T)) for name in ("q", "k", "v", "a", "b")
    }
    return {**grouped, "A_log": rows.A_log, "dt_bias": rows.dt_bias}


def naive_decode(rows: Rows, state: Tensor, slots: Tensor, **options: Any) -> Tensor:
    """Call FlashInfer as its documentation has it."""
    o = torch.full_like(rows.v, torch.nan)
    importlib.import_module("flashinfer.gdn_decode").gated_delta_rule_decode_pretranspose(
        **_grouped(rows, 1),
        state=None,
        scale=SPEC.q_scale,
        output=o[:, None],
        initial_state=state,
        initial_state_indices=slots,
        backend="flashinfer",
        **options,
    )
    torch.cuda.synchronize()
    return o


def naive_verify(rows: Rows, state: Tensor, slots: Tensor, T: int, **options: Any) -> Tensor:
    """Call FlashInfer as its documentation has it."""
    o = torch.full_like(rows.v, torch.nan)
    call = importlib.import_module("flashinfer.gdn_decode").gated_delta_rule_mtp
    if state.dtype is torch.bfloat16:
        call = importlib.import_module("flashinfer.gdn_decode").gated_delta_rule_decode_pretranspose
        options |= {"state": None, "backend": "flashinfer"}
    call(
        **_grouped(rows, T),
        scale=SPEC.q_scale,
        output=o.unflatten(0, (-1, T)),
        initial_state=state,
        initial_state_indices=slots,
        **options,
    )
    torch.cuda.synchronize()
    return o


def snapshots(spec: GdnSpec, rows: int, steps: int) -> SnapshotDrafts:
    """Return snapshots of states alone, NaN."""
    shape = (rows, steps, spec.num_v_heads, spec.head_v_dim, spec.head_k_dim)
    return SnapshotDrafts(None, torch.full(shape, torch.nan, dtype=spec.state_dtype, device="cuda"))


def compare_verify(
    spec: GdnSpec, rows: Rows, metadata: VerifyMetadata, make: Callable[[], Any]
) -> None:
    """Verify by FlashInfer's adapter and by Triton; compare all but the scratch slot."""
    results = []
    for ops in (bound(spec, VERIFY), bind(spec, "cuda")):
        state, drafts = states_of(spec), make()
        o = ops.mtp_verify(*rows, state, metadata=metadata, drafts=drafts)
        results.append([o, state[:SLOTS], *([] if drafts is None else [drafts.state])])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2, equal_nan=True)


class Chunk(NamedTuple):
    """What chunk_prefill takes; q and k are unit vectors."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor


def _unit(x: Tensor) -> Tensor:
    return (x.float() / x.float().norm(dim=-1, keepdim=True)).to(x.dtype)


def chunk_of(T: int, seed: int = 0) -> Chunk:
    """Return T tokens."""
    q, k = _unit(normal(2, T, H, K, seed=seed))
    g = -normal(T, HV, seed=seed + 1, dtype=torch.float32).abs() * 0.1
    beta = normal(T, HV, seed=seed + 2, dtype=torch.float32).sigmoid()
    return Chunk(q, k, normal(T, HV, K, seed=seed + 3), g, beta)


def offsets_of(*lengths: int) -> Tensor:
    """Return where sequences of these lengths start."""
    return torch.tensor([0, *lengths], device="cuda").cumsum(0)


def naive_chunk(
    rows: Chunk, state: Tensor, lengths: tuple[int, ...], slots: Tensor | None, **options: Any
) -> Tensor:
    """Call FlashInfer as its documentation has it."""
    o = torch.full_like(rows.v, torch.nan)
    importlib.import_module("flashinfer.gdn_prefill").chunk_gated_delta_rule(
        **{
            "q": rows.q,
            "k": rows.k,
            "v": rows.v,
            "g": rows.g.exp(),
            "beta": rows.beta,
            "scale": SPEC.q_scale,
            "initial_state": state,
            "output_state": state,
            "output_final_state": True,
            "cu_seqlens": offsets_of(*lengths).int(),
            "output": o,
            "use_cp": False,
            "state_indices": slots,
            "backend": "flashinfer",
            **options,
        }
    )
    return o


def changed_rows(after: Tensor, before: Tensor) -> list[int]:
    """Return the rows that differ."""
    moved = (after != before) | (after.isnan() != before.isnan())
    return [int(i) for i in moved.flatten(1).any(1).nonzero()]
