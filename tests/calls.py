# SPDX-License-Identifier: Apache-2.0
"""A valid call of every op, under every protocol, for tests that spoil one argument of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_portable import GdnSpec, InputError, PrefillMetadata, VerifyMetadata, bind
from tests.cases import (
    ab,
    conv_params,
    decays,
    deferred_updates,
    flags,
    g_beta,
    gate,
    generator,
    mixed_qkv,
    nan,
    offsets,
    params,
    pending_drafts,
    pool,
    qkv,
    slots,
    snapshot_drafts,
)

SPEC = GdnSpec(
    num_k_heads=2,
    num_v_heads=4,
    head_k_dim=8,
    head_v_dim=6,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
    conv_window=5,
)
NUM_SLOTS = 8
MAX_DRAFTS = 3
ROWS = 6  # the last one belongs to nobody where there are cu_seqlens

Call = dict[str, Any]

PREFILLS = ("conv1d_prefill", "chunk_prefill", "prefill_step")
DECODES = ("conv1d_update", "recurrent_decode", "decode_step")
VERIFIES = ("conv1d_verify", "mtp_verify", "verify_step")
REPLAYS, SNAPSHOTS, TABLES = (
    tuple(f"{op} {protocol}" for op in VERIFIES) for protocol in ("replay", "snapshot", "table")
)
DEFERRED = ("recurrent_decode deferred", "decode_step deferred")
COMMITS = ("mtp_commit replay", "mtp_commit snapshot")
CASES = (
    *("gating", "gated_rms_norm", "plan_prefill"),
    *(PREFILLS + DECODES + DEFERRED + REPLAYS + SNAPSHOTS + TABLES + COMMITS),
)


def call_of(case: str, spec: GdnSpec = SPEC) -> Call:
    """Return the arguments, by name, of a call that is in order; ``out`` is NaN."""
    op, _, protocol = case.partition(" ")
    rng = generator()
    batch = _batch(op, protocol, spec)
    states = pool(spec, rng, NUM_SLOTS, live=range(1, NUM_SLOTS), columns=spec.conv_state_len)
    rows = 2 if op in DECODES else ROWS
    a, b = ab(spec, rng, rows)
    if op == "plan_prefill":
        return batch
    if op == "mtp_commit":
        return {"pool": states, **batch}
    if op.startswith("conv1d"):
        weight, bias = conv_params(spec, rng)
        x = mixed_qkv(spec, rng, rows)
        call = {"x": x, "weight": weight, "bias": bias, "conv_state": states.conv_state, **batch}
        return {**call, "out": nan(*x.shape, dtype=spec.dtype)}
    if op == "gating":
        return {"a": a, "b": b, **dict(zip(("A_log", "dt_bias"), decays(spec, rng), strict=True))}
    out = nan(rows, spec.num_v_heads, spec.head_v_dim, dtype=spec.dtype)
    if op == "gated_rms_norm":
        weight = params(spec, rng).norm_weight
        return {"x": gate(spec, rng, rows), "gate": gate(spec, rng, rows), "weight": weight} | {
            "out": out
        }
    if op.endswith("step"):
        step = {"mixed_qkv": mixed_qkv(spec, rng, rows), "a": a, "b": b, "pool": states}
        own = {"params": params(spec, rng), "gate": gate(spec, rng, rows), "out": out}
        return {**step, **own, **batch}
    q, k, v = qkv(spec, rng, rows)
    names, gates = ("a", "b", "A_log", "dt_bias"), (a, b, *decays(spec, rng))
    if op == "chunk_prefill":
        names, gates = ("g", "beta"), g_beta(spec, rng, rows)
    rule = {"q": q, "k": k, "v": v, **dict(zip(names, gates, strict=True))}
    return {**rule, "state": states.state, **batch, "out": out}


def _batch(op: str, protocol: str, spec: GdnSpec) -> Call:
    """Return metadata, slots and drafts: two sequences, of 3 and 2 tokens where packed."""
    if protocol == "deferred":
        updates = deferred_updates(spec, generator(1), NUM_SLOTS, MAX_DRAFTS)
        counts = {"num_deferred": slots(2, 3), "flush": flags(True, False)}
        return {"state_indices": slots(1, 4), "deferred": updates, **counts}
    if op in DECODES:
        return {"state_indices": slots(1, 4), "out_state_indices": slots(1, 5)}
    if op in (*PREFILLS, "plan_prefill"):
        metadata = PrefillMetadata(
            cu_seqlens=offsets(3, 2),
            state_indices=slots(1, 4),
            has_initial_state=flags(True, True),
            out_state_indices=slots(1, 5),
            checkpoint_offsets=slots(2, -1),
            checkpoint_indices=slots(6, -1),
            seq_lens_cpu=[3, 2],
        )
        if op == "chunk_prefill":
            kept = nan(NUM_SLOTS, spec.num_v_heads, spec.head_v_dim, spec.head_k_dim)
            return {"metadata": metadata, "checkpoint_state": kept.float()}
        return {"metadata": metadata}
    if not protocol:
        return {}
    own = {
        "replay": {"parents": torch.tensor([[0, 0, 1], [0, 0, 0]])},
        "snapshot": {
            "rows": slots(1, 0),
            "next_token": slots([1, -1, -1], [1, -1, -1]),
            "next_sibling": slots([-1, 2, -1], [-1, -1, -1]),
        },
        "table": {"state_indices": slots([2, 3, 4], [5, 6, 7])},
    }
    common = {"state_indices": slots(2, 5), "cu_seqlens": offsets(3, 2)}
    metadata = VerifyMetadata(
        **{**common, "num_accepted": slots(2, 0), **own[protocol]}, max_drafts=MAX_DRAFTS
    )
    if protocol == "table":
        return {"metadata": metadata}
    drafts = (
        pending_drafts(spec, generator(1), NUM_SLOTS, MAX_DRAFTS, pending={2: 2})
        if protocol == "replay"
        else snapshot_drafts(spec, 2, MAX_DRAFTS)
    )
    if op != "mtp_commit":
        return {"metadata": metadata, "drafts": drafts}
    kept = {"last_accepted": slots(1, -1), "out_state_indices": slots(2, 6)}
    return {"metadata": metadata, "drafts": drafts, **kept}


def replaced(call: Call, **changes: Any) -> Call:
    """Return the call with arguments changed, those inside another as ``metadata__rows``."""
    changed = dict(call)
    for name, value in changes.items():
        outer, _, inner = name.partition("__")
        changed[outer] = dataclasses.replace(changed[outer], **{inner: value}) if inner else value
    return changed


def leaves(call: Call, prefix: str = "") -> dict[str, Tensor]:
    """Return every tensor of a call by its name in :func:`replaced`."""
    found: dict[str, Tensor] = {}
    for name, value in call.items():
        if isinstance(value, Tensor):
            found[prefix + name] = value
        elif dataclasses.is_dataclass(value):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            found |= leaves(fields, f"{prefix}{name}__")
    return found


def run(case: str, call: Call, spec: GdnSpec = SPEC) -> Any:
    """Make a call with checks on."""
    return getattr(bind(spec, "cpu", check=True), case.partition(" ")[0])(**call)


def refusal(case: str, call: Call, spec: GdnSpec = SPEC) -> str:
    """Make a call that must be refused with every tensor as it was; return what is said."""
    before = contents(call)
    with pytest.raises(InputError) as caught:
        run(case, call, spec)
    after = contents(call)
    assert [name for name in after if after[name] != before.get(name)] == []
    message = str(caught.value)
    assert "needs" in message
    assert "\n" not in message
    return message


def contents(call: Call) -> dict[str, bytes]:
    """Return the bytes of every tensor's storage, what lies between its elements included."""
    return {
        name: torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy().tobytes()
        for name, tensor in leaves(call).items()
        if tensor.device.type == "cpu"
    }
