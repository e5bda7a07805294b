# SPDX-License-Identifier: Apache-2.0
"""What the host does for a launch of the replay kernel: it finds out whether the tensors fit."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gdn_backend_cuda.cute_replay.shape import ROOM, K, P, Shape, V
from gdn_portable.metadata import GdnParams, ReplayDrafts, VerifyMetadata
from gdn_portable.spec import GdnSpec

# the axes whose strides the kernel takes, both in the order of ``Tensors``
AXES: dict[str, tuple[int, ...]] = {
    "state": (0, 1), "mixed": (0, 1), "weight": (0, 1), "bias": (0,), "window": (0, 1, 2),
    "inputs": (0, 1), "a": (0, 1), "b": (0, 1), "A_log": (), "dt_bias": (), "kept_k": (0, 1, 2),
    "kept_v": (0, 1, 2), "kept_g": (0, 1, 2), "kept_beta": (0, 1, 2), "out": (0, 1),
}  # fmt: skip
STATE, KEPT_K, KEPT_V, OUT = (list(AXES).index(x) for x in ("state", "kept_k", "kept_v", "out"))
# those that are contiguous along an axis
CONTIGUOUS = {
    "A_log": 0, "dt_bias": 0, "inputs": 2, "out": 2, "kept_k": 3, "kept_v": 3,
}  # fmt: skip
OF_ACTIVATIONS = (
    "mixed", "weight", "bias", "window", "inputs", "a", "b", "kept_k", "kept_v", "out",
)  # fmt: skip
IN_FLOAT32 = ("A_log", "kept_g", "kept_beta")
# bytes of what is moved at once: bulk copies and vectors, two outputs of a lane
VECTOR, PAIR = 16, 4
ALIGNMENT = {"state": VECTOR, "kept_k": VECTOR, "kept_v": VECTOR, "out": PAIR}

Given = Sequence[Tensor | None]  # in the order of AXES
Layout = tuple[tuple[torch.dtype, tuple[int, ...]] | None, ...]  # of what is given


class Team(NamedTuple):
    """Who takes an item: the warps of a block, and how many blocks an SM is to hold."""

    warps: int
    blocks: int


ANY = sys.maxsize
FEW = 132  # items: each has an SM of an H200 to itself
# by the most bytes of an item's states, and the most items of a batch. H200, H16/HV32, in us at B =
# 8, 32, 128: float32 states 12.5, 44.6, 158 with (8, 1), 14.6, 42.6, 157 with (4, 2), 14.5, 43.6,
# 156 with (8, 2); bfloat16 8.7, 27.0, 87.9, and 10.0, 29.7, 88.8, and 8.5, 26.5, 87.2. Of 16 drafts
# float32 21.4, 78.2, 267 with (8, 1), 26.4, 72.3, 244 with (4, 2); bfloat16 18.4, 63.9, 230, and
# 21.1, 62.2, 200
FEW_OR_MANY = ((FEW, Team(8, 1)), (ANY, Team(4, 2)))
TEAMS: tuple[tuple[int, tuple[tuple[int, Team], ...]], ...] = (
    (64 << 10, ((ANY, Team(8, 2)),)),
    (128 << 10, FEW_OR_MANY),
    (ANY, ((ANY, Team(8, 1)),)),
)


class Kind(NamedTuple):
    """What calls differ in: each kind is compiled on its own."""

    has_bias: bool
    has_accepted: bool
    float32_dt_bias: bool
    drafts: int
    room: int


def kind_of(params: GdnParams, metadata: VerifyMetadata, drafts: ReplayDrafts) -> Kind:
    """Return the kind of a call."""
    return Kind(
        params.conv_bias is not None,
        metadata.num_accepted is not None,
        params.dt_bias.dtype is torch.float32,
        metadata.max_drafts,
        drafts.k.shape[1],
    )


def shapes_of(spec: GdnSpec, kind: Kind) -> list[tuple[int, Shape]]:
    """Return up to how many items of a batch what is compiled; their results are the same bits."""
    heads = spec.num_v_heads // spec.num_k_heads
    size = heads * K * V * spec.state_dtype.itemsize
    dtype, state = (str(x).removeprefix("torch.") for x in (spec.dtype, spec.state_dtype))
    teams = next(teams for most, teams in TEAMS if size <= most)
    if spec.dtype is torch.float16 or kind.room > 4:
        # two terms of X, or more rows, take registers that two blocks of 8 warps do not have
        teams = FEW_OR_MANY if heads <= 2 else ((ANY, Team(8, 1)),)
    return [
        (items, Shape(
            H=spec.num_k_heads, HV=spec.num_v_heads, dtype=dtype, state=state,
            pad_slot=spec.pad_slot, scale=spec.q_scale, has_norm=spec.qk_l2norm,
            has_silu=spec.activation == "silu", **kind._asdict(), **team._asdict(),
        ))
        for items, team in teams
    ]  # fmt: skip


def least_items(spec: GdnSpec, drafts: int) -> int:
    """Return from how many items on it is faster than the Triton kernels.

    A block has all value heads of its item, so that few items with many heads leave SMs idle. H200,
    us, Triton and this, float32 states unless said. H16/HV32, B = 1: P = 1, 8.2 and 8.3; P = 2, 8.5
    and 8.6; P = 3, 9.1 and 8.8; P = 8, 13.0 and 9.7; B = 2: P = 1, 9.0 and 8.8; float16 throughout,
    P = 4: B = 1, 7.8 and 8.0, B = 2, 9.5 and 8.8; P = 1: B = 2, 7.4 and 8.1, B = 4, 8.8 and 8.7.
    H8/HV16, B = 1: P = 2, 7.6 and 8.2; P = 4, 8.4 and 8.4. H2/HV8, P = 4: B = 16, 13.4 and 14.0,
    with bfloat16 states 10.6 and 9.9; B = 32, 17.2 and 15.6.
    """
    least = 32 if drafts <= 2 else 16 if drafts <= 4 else 1
    if spec.dtype is spec.state_dtype is torch.float16:
        least *= 2
    if spec.num_v_heads > 2 * spec.num_k_heads:
        least = max(least, 64 if spec.state_dtype is torch.float32 else 32)
    return least


def tensors_of(
    mixed: Tensor, a: Tensor, b: Tensor, params: GdnParams, conv_state: Tensor, state: Tensor,
    drafts: ReplayDrafts, out: Tensor,
) -> Given:  # fmt: skip
    """Return the tensors in the order of ``AXES``."""
    return (
        state, mixed, params.conv_weight, params.conv_bias, conv_state, drafts.conv_inputs, a, b,
        params.A_log, params.dt_bias, drafts.k, drafts.v, drafts.g, drafts.beta, out,
    )  # fmt: skip


def is_served(metadata: VerifyMetadata, drafts: ReplayDrafts) -> bool:
    """Return whether a batch is of chains of one length, up to P, with room for up to ROOM."""
    return (
        1 <= metadata.max_drafts <= P
        and metadata.cu_seqlens is None
        and not metadata.is_tree
        and metadata.max_drafts <= drafts.k.shape[1] <= ROOM
    )


def layout_of(given: Given) -> Layout:
    """Return what decides whether the tensors fit, but for where they start."""
    return tuple([None if x is None else (x.dtype, x.stride()) for x in given])


def strides_of(layout: Layout, dtype: torch.dtype) -> tuple[int, ...] | None:
    """Return the strides in bytes that the kernel takes; None where the tensors do not fit.

    ``dtype`` is that of activations.

    It costs tens of microseconds: to be kept by layout.
    """
    by_name = dict(zip(AXES, layout, strict=True))
    dtypes = {name: part[0] for name, part in by_name.items() if part is not None}
    strides = {name: part[1] for name, part in by_name.items() if part is not None}

    def in_bytes(name: str) -> list[int]:
        if name not in strides:
            return [0 for _ in AXES[name]]
        return [strides[name][axis] * dtypes[name].itemsize for axis in AXES[name]]

    fits = (
        all(dtypes.get(name, dtype) is dtype for name in OF_ACTIVATIONS)
        and all(dtypes[name] is torch.float32 for name in IN_FLOAT32)
        and dtypes["dt_bias"] in (torch.float32, dtype)
        and strides["state"][2:] == (K, 1)
        and all(strides[name][axis] == 1 for name, axis in CONTIGUOUS.items())
        and not any(step % size for name, size in ALIGNMENT.items() for step in in_bytes(name))
    )
    return tuple(step for name in AXES for step in in_bytes(name)) if fits else None


def numbers_of(
    given: Given, strides: tuple[int, ...], metadata: VerifyMetadata, items: int
) -> list[int] | None:
    """Return what the kernel is started with; None where a tensor starts where it may not.

    They are the fields of ``Tensors``, the addresses and strides of slots and of counts, and the
    number of items.
    """
    addresses = [0 if x is None else x.data_ptr() for x in given]
    copied = addresses[STATE] | addresses[KEPT_K] | addresses[KEPT_V]
    if copied % VECTOR or addresses[OUT] % PAIR:
        return None
    slots, counts = metadata.state_indices, metadata.num_accepted
    # of int64 the lower half is read
    indices = [slots.data_ptr(), slots.stride(0) * slots.itemsize, 0, 0]
    if counts is not None:
        indices[2:] = counts.data_ptr(), counts.stride(0) * counts.itemsize
    return [*addresses, *strides, *indices, items]
