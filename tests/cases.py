# SPDX-License-Identifier: Apache-2.0
"""Inputs for the tests, and the comparison of an op with the oracle on copies of its arguments."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gdn_portable import (
    DeferredUpdates,
    GdnParams,
    GdnSpec,
    ReplayDrafts,
    SnapshotDrafts,
    StatePool,
    bind,
)
from gdn_portable.metadata import conv_slot_shape, state_slot_shape
from tests import oracle

F64 = torch.float64
SPEC = GdnSpec(num_k_heads=2, num_v_heads=4, head_k_dim=5, head_v_dim=3, dtype=F64, state_dtype=F64)
FLOAT32 = dataclasses.replace(SPEC, dtype=torch.float32, state_dtype=torch.float32)


def cpu(spec):
    return bind(spec, "cpu")


def check(spec, op, *args, out=None, tolerance=1e-10, **kwargs):
    """Run an op and the oracle, and compare all that the op returned, wrote and left alone."""
    call = {"args": args, "kwargs": kwargs, "out": out}
    before, want = copies(call), copies(call)
    got = getattr(cpu(spec), op)(*args, **kwargs, **({} if out is None else {"out": out}))
    expected = getattr(oracle, op)(spec, *want["args"], **want["kwargs"])
    if out is not None:
        assert got is out
        want["out"].copy_(expected)
    elif expected is not None:
        assert_close(got, expected, tolerance)
    for after, old, new in zip(*map(tensors, (call, before, want)), strict=True):
        assert_written(after, old, new, tolerance)
    return got


def assert_close(got, expected, tolerance=1e-10):
    for one, other in zip(tensors(got), tensors(expected), strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=tolerance)


def assert_identical(got, expected):
    """Bit by bit, so that NaN equals NaN."""
    for one, other in zip(tensors(got), tensors(expected), strict=True):
        assert torch.equal(bits(one.contiguous()), bits(other.contiguous()))


def assert_written(after, before, want, tolerance=1e-10):
    """Whole storages agree: what the oracle left alone bit by bit, what it wrote closely."""
    after, before, want = map(storage_of, (after, before, want))
    untouched = bits(want) == bits(before)
    assert torch.equal(bits(after)[untouched], bits(before)[untouched])
    assert_close(after[~untouched], want[~untouched], tolerance)


def tensors(value):
    """Every tensor in nested arguments, ``parents`` excepted: it is filled where it is None."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for key, item in value.items() if key != "parents" for t in tensors(item)]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in tensors(item)]
    return tensors(fields(value)) if dataclasses.is_dataclass(value) else []


def copies(value, storages=None):
    """Copy nested arguments, tensors with their strides and with whatever lies between them."""
    storages = {} if storages is None else storages
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        copy = storages.setdefault(storage.data_ptr(), storage.clone())
        place = value.storage_offset(), value.shape, value.stride()
        return torch.empty(0, dtype=value.dtype).set_(copy, *place)
    if isinstance(value, dict):
        return {key: copies(item, storages) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [copies(item, storages) for item in value]
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **copies(fields(value), storages))
    return value


def fields(value):
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def storage_of(tensor):
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.detach().untyped_storage())


def bits(tensor):
    return tensor if not tensor.is_floating_point() else tensor.view(WORDS[tensor.itemsize])


WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random(rng, *shape, dtype=F64):
    return torch.randn(*shape, generator=rng, dtype=F64).to(dtype)


def nan(*shape, dtype=F64):
    return torch.full(shape, float("nan"), dtype=dtype)


def slots(*indices, dtype=torch.int32):
    return torch.tensor(indices, dtype=dtype)


def offsets(*lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def flags(*claims):
    return torch.tensor(claims, dtype=torch.bool)


def strided(tensor, step=3):
    """The same values, ``step`` elements apart, with NaN or -9 between them."""
    hole = float("nan") if tensor.is_floating_point() else -9
    wide = torch.full((*tensor.shape, step), hole, dtype=tensor.dtype)
    wide[..., 1] = tensor
    return wide[..., 1]


def over_long(indices, extra=3):
    """The same entries with valid-looking ones after them, which nobody asked for."""
    return torch.cat([indices, indices.new_zeros(extra, *indices.shape[1:])])


INDEX_FORMS = {
    "int32": lambda indices: indices.int(),
    "int64": lambda indices: indices.long(),
    "strided": strided,
    "over-long": over_long,
    "strided and over-long": lambda indices: strided(over_long(indices.long())),
}
index_forms = pytest.mark.parametrize("form", INDEX_FORMS.values(), ids=INDEX_FORMS)


def conv_params(spec, rng, bias=True):
    weight = random(rng, spec.conv_dim, spec.conv_width, dtype=spec.dtype)
    return weight, random(rng, spec.conv_dim, dtype=spec.dtype) if bias else None


def params(spec, rng, bias=True):
    weight, bias = conv_params(spec, rng, bias)
    norm_weight = random(rng, spec.head_v_dim, dtype=spec.dtype)
    return GdnParams(weight, *decays(spec, rng), bias, norm_weight)


def pool(spec, rng, num_slots, live, paged=False, columns=None):
    """States of NaN, but for the slots that may be read and the columns that hold history."""
    made = StatePool.allocate(spec, num_slots, "cpu", paged=paged)
    storage_of(made.conv_state).fill_(float("nan"))
    storage_of(made.state).fill_(float("nan"))
    windows = oracle.conv_view(spec, made.conv_state)
    for slot in live:
        history = random(rng, spec.conv_dim, columns or spec.conv_width - 1)
        windows[slot, :, : history.shape[1]] = history.to(windows.dtype)
        made.state[slot] = random(rng, *made.state.shape[1:]).to(made.state.dtype)
    return made


def conv_pool(spec, rng, num_slots, live, **options):
    return pool(spec, rng, num_slots, live, **options).conv_state


def state_pool(spec, rng, num_slots, live, **options):
    return pool(spec, rng, num_slots, live, **options).state


def mixed_qkv(spec, rng, T, real=None):
    """[T, D] inputs; rows from ``real`` on are NaN."""
    x = random(rng, T, spec.conv_dim, dtype=spec.dtype)
    x[T if real is None else real :] = float("nan")
    return x


def packed(rng, T, *widths, real=None, dtype=F64):
    """Slices [T, width] of one packed projection; rows from ``real`` on are NaN."""
    rows = random(rng, T, sum(widths) + 2, dtype=dtype)
    rows[T if real is None else real :] = float("nan")
    return rows[:, 2:].split(widths, dim=1)


def qkv(spec, rng, T, real=None):
    """q, k, v as slices of one packed projection."""
    H, HV, K, V = spec.num_k_heads, spec.num_v_heads, spec.head_k_dim, spec.head_v_dim
    q, k, v = packed(rng, T, H * K, H * K, HV * V, real=real, dtype=spec.dtype)
    return q.unflatten(1, (H, K)), k.unflatten(1, (H, K)), v.unflatten(1, (HV, V))


def ab(spec, rng, T, real=None):
    """a, b as slices of one packed projection."""
    return packed(rng, T, spec.num_v_heads, spec.num_v_heads, real=real, dtype=spec.dtype)


def decays(spec, rng):
    """A_log and dt_bias."""
    HV = spec.num_v_heads
    return random(rng, HV, dtype=spec.compute_dtype), random(rng, HV, dtype=spec.compute_dtype)


def g_beta(spec, rng, T):
    g, beta = -random(rng, T, spec.num_v_heads).abs(), random(rng, T, spec.num_v_heads).sigmoid()
    return 0.3 * g.to(spec.compute_dtype), beta.to(spec.compute_dtype)


def gate(spec, rng, T):
    return packed(rng, T, spec.num_v_heads * spec.head_v_dim, dtype=spec.dtype)[0].unflatten(
        1, (spec.num_v_heads, spec.head_v_dim)
    )


def replay_drafts(spec, num_slots, max_drafts):
    drafts = ReplayDrafts.allocate(spec, num_slots, max_drafts, "cpu")
    for tensor in tensors(drafts):
        tensor.fill_(float("nan"))
    return drafts


def pending_drafts(spec, rng, num_slots, max_drafts, pending):
    """Drafts of which the first ``pending[slot]`` of a slot are there to be replayed."""
    drafts = replay_drafts(spec, num_slots, max_drafts)
    for slot, count in pending.items():
        for tensor in tensors(drafts):
            tensor[slot, :count] = random(rng, count, *tensor.shape[2:]).to(tensor.dtype)
        drafts.g[slot, :count] *= -drafts.g[slot, :count].sign()
        drafts.beta[slot, :count] = drafts.beta[slot, :count].sigmoid()
    return drafts


def deferred_updates(spec, rng, num_slots, room, counts=None):
    """Updates of which the first ``counts[slot]`` of a slot are there, or all; others are NaN."""
    updates = DeferredUpdates.allocate(spec, num_slots, room, "cpu")
    for tensor in tensors(updates):
        tensor.copy_(random(rng, *tensor.shape))
    updates.g *= -updates.g.sign()
    for slot in range(num_slots if counts is not None else 0):
        for tensor in tensors(updates):
            tensor[slot, counts.get(slot, 0) :] = torch.nan
    return updates


def snapshot_drafts(spec, num_rows, steps, layers=()):
    conv_shape = (*layers, num_rows, steps, *conv_slot_shape(spec, spec.conv_width - 1))
    state_shape = (*layers, num_rows, steps, *state_slot_shape(spec))
    return SnapshotDrafts(
        nan(*conv_shape, dtype=spec.conv_state_dtype), nan(*state_shape, dtype=spec.state_dtype)
    )


PROTOCOLS = {"replay": replay_drafts, "snapshot": snapshot_drafts}
protocols = pytest.mark.parametrize("make_drafts", PROTOCOLS.values(), ids=PROTOCOLS)


def random_parents(rng, B, P):
    """[B, P] of which every entry after the root names an earlier draft."""
    rows = [
        [-1] + [int(torch.randint(t, (), generator=rng)) for t in range(1, P)] for _ in range(B)
    ]
    return torch.tensor(rows, dtype=torch.int64).reshape(B, P)


def first_child_next_sibling(parents):
    """The same trees as ``next_token`` and ``next_sibling``."""
    next_token, next_sibling = torch.full_like(parents, -1), torch.full_like(parents, -1)
    for b, row in enumerate(parents.tolist()):
        for parent in range(len(row)):
            children = [t for t in range(1, len(row)) if row[t] == parent]
            for child in children[:1]:
                next_token[b, parent] = child
            for child, sibling in pairwise(children):
                next_sibling[b, child] = sibling
    return next_token, next_sibling
