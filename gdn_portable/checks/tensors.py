# SPDX-License-Identifier: Apache-2.0
"""Rules for single arguments, known to be tensors: their shapes, strides, dtypes and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn_portable.errors import InputError
from gdn_portable.metadata import GdnParams, conv_slot_shape, state_slot_shape
from gdn_portable.spec import ConvLayout, Device, GdnSpec, Op, StateLayout, torch_device

INTEGERS = (torch.int32, torch.int64)
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# letters of each tensor argument; T is B where a row is a sequence
SHAPES = {
    "x": "T D",
    "mixed_qkv": "T D",
    "weight": "D W",
    "bias": "D",
    "q": "T H K",
    "k": "T H K",
    "v": "T HV V",
    "a": "T HV",
    "b": "T HV",
    "g": "T HV",
    "beta": "T HV",
    "A_log": "HV",
    "dt_bias": "HV",
    "gate": "T HV V",
    "out": "T HV V",
}
SHAPES_OF: Mapping[Op, Mapping[str, str]] = {
    Op.CONV1D_PREFILL: {"out": "T D"},
    Op.CONV1D_UPDATE: {"out": "T D"},
    Op.CONV1D_VERIFY: {"out": "T D"},
    Op.GATED_RMS_NORM: {"x": "T HV V", "weight": "V"},
}
OF_SEQUENCES = (Op.CONV1D_UPDATE, Op.RECURRENT_DECODE, Op.DECODE_STEP)
IN_PLACE = (Op.CONV1D_UPDATE, Op.CONV1D_VERIFY, Op.GATED_RMS_NORM)
ACTIVATIONS = ("x", "mixed_qkv", "q", "k", "v")
DENSE_VECTORS = ("q", "k", "v", "gate")  # token and head strides are free


class Rules(NamedTuple):
    """What the arguments of a layer's ops must look like."""

    spec: GdnSpec
    device: Device

    def tensors(self, op: Op, arguments: Mapping[str, Any]) -> int:
        """Check shapes, dtypes, strides and device; return the rows of the batch."""
        shapes = {**SHAPES, **SHAPES_OF.get(op, {})}
        sizes, rows = self.sizes(), "B" if op in OF_SEQUENCES else "T"
        for name, value in arguments.items():
            if name not in shapes or value is None:
                continue
            if rows not in sizes and value.dim():
                sizes[rows] = len(value)
            dtypes: Sequence[torch.dtype] = FLOATS
            if name in ACTIVATIONS and op is not Op.GATED_RMS_NORM:
                dtypes = (self.spec.dtype,)
            elif name in ("g", "beta"):
                dtypes = self.double_or_float()
            letters = shapes[name]
            if name == "gate" and value.dim() == 2:
                letters = "T HV*V"
            self.tensor(name, value, letters.replace("T", rows), sizes, dtypes)
            if name in DENSE_VECTORS:
                self.dense(name, value)
        out = arguments.get("out")
        if out is not None:
            self.writable("out", out)
            for name in ACTIVATIONS:
                value = arguments.get(name)
                if value is None or (op in IN_PLACE and _same_memory(out, value)):
                    continue
                self.apart("out", out, name, value)
        return sizes.get(rows, 0)

    def sizes(self) -> dict[str, int]:
        """Return the size behind each letter."""
        spec = self.spec
        return {
            "D": spec.conv_dim,
            "W": spec.conv_width,
            "H": spec.num_k_heads,
            "HV": spec.num_v_heads,
            "K": spec.head_k_dim,
            "V": spec.head_v_dim,
            "HV*V": spec.num_v_heads * spec.head_v_dim,
        }

    def tensor(
        self,
        name: str,
        value: Tensor,
        letters: str,
        sizes: Mapping[str, int],
        dtypes: Sequence[torch.dtype],
    ) -> None:
        """Check a tensor against its letters."""
        needed = tuple(sizes.get(letter, "any") for letter in letters.split())
        matches = len(needed) == value.dim() and all(
            want in ("any", got) for want, got in zip(needed, value.shape, strict=True)
        )
        if not matches:
            raise InputError(
                f"{name} has shape {shape_text(value.shape)}, needs {shape_text(needed)} "
                f"[{letters.replace(' ', ', ')}]"
            )
        self.dtype_and_device(name, value, dtypes)

    def dtype_and_device(self, name: str, value: Tensor, dtypes: Sequence[torch.dtype]) -> None:
        """Check where and of what a tensor is."""
        if value.dtype not in dtypes:
            needed = " or ".join(str(dtype) for dtype in dtypes)
            raise InputError(f"{name} has dtype {value.dtype}, needs {needed}")
        needed_on = torch_device(self.device)
        anywhere = needed_on.index is None and value.device.type == needed_on.type
        if not anywhere and value.device != needed_on:
            raise InputError(f"{name} is on {value.device}, needs {self.device}")

    def dense(self, name: str, value: Tensor) -> None:
        """Check that the vectors of heads are contiguous."""
        if value.shape[-1] > 1 and value.numel() and value.stride(-1) != 1:
            raise InputError(
                f"{name} has strides {value.stride()}, needs 1 at the end: the vector of a head "
                "is contiguous"
            )

    def writable(self, name: str, value: Tensor) -> None:
        """Check that no two elements share memory: each axis steps over all within it."""
        extent = 1
        for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
            if size > 1 and stride < extent and value.numel():
                raise InputError(
                    f"{name} has strides {value.stride()}, needs memory for each element"
                )
            extent += (size - 1) * stride

    def apart(self, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
        """Check that what is written shares no memory with another tensor."""
        if _overlap(value, other):
            raise InputError(f"{name} shares memory with {other_name}, needs memory of its own")

    def params(self, params: GdnParams, gate: Tensor | None) -> None:
        """Check a layer's parameters."""
        sizes = self.sizes()
        named = (
            ("conv_weight", "D W"),
            ("conv_bias", "D"),
            ("A_log", "HV"),
            ("dt_bias", "HV"),
            ("norm_weight", "V"),
        )
        for name, letters in named:
            value = getattr(params, name)
            if value is not None:
                self.tensor(f"params.{name}", value, letters, sizes, FLOATS)
        self.eps("params.norm_eps", params.norm_eps)
        if gate is not None and params.norm_weight is None:
            raise InputError("gate is given and params.norm_weight is None, needs both or neither")

    def eps(self, name: str, value: object) -> None:
        """Check what is added to a mean of squares."""
        if not isinstance(value, (int, float)) or not 0 <= value < inf:
            raise InputError(f"{name} is {value!r}, needs a number of at least 0")

    def pools(self, conv_state: Tensor | None, state: Tensor | None) -> int:
        """Check the pools that are given; return how many slots they have."""
        slots = []
        if conv_state is not None:
            shape = conv_slot_shape(self.spec, self.spec.conv_state_len)
            dtypes = (self.spec.conv_state_dtype,)
            self.pool("conv_state", conv_state, shape, dtypes, self.time_axis())
            slots.append(len(conv_state))
        if state is not None:
            self.state("state", state, (self.spec.state_dtype,))
            slots.append(len(state))
        if conv_state is not None and state is not None:
            self.apart("conv_state", conv_state, "state", state)
        return min(slots, default=0)

    def time_axis(self) -> int:
        """Return the axis of a conv state that holds the columns."""
        return -1 if self.spec.conv_layout is ConvLayout.DIM_FIRST else -2

    def double_or_float(self) -> Sequence[torch.dtype]:
        """Return what a float32 argument may be: the spec may name float64."""
        return tuple(dict.fromkeys((torch.float32, self.spec.compute_dtype)))

    def state(self, name: str, value: Tensor, dtypes: Sequence[torch.dtype]) -> None:
        """Check a pool of recurrent states."""
        self.pool(name, value, state_slot_shape(self.spec), dtypes, None)
        if value.shape[-1] > 1 and value.stride(-1) != 1:
            last = "K" if self.spec.state_layout is StateLayout.VK else "V"
            raise InputError(
                f"{name} has strides {value.stride()}, needs {last} contiguous: declare the layout "
                "in the spec"
            )

    def pool(
        self,
        name: str,
        value: Tensor,
        shape: tuple[int, ...],
        dtypes: Sequence[torch.dtype],
        growing_axis: int | None,
    ) -> None:
        """Check a pool whose slots have ``shape``, one axis of which may be longer."""
        got = list(value.shape[1:])
        if growing_axis is not None and len(got) == len(shape):
            got[growing_axis] = min(got[growing_axis], shape[growing_axis])
        if value.dim() != len(shape) + 1 or tuple(got) != shape:
            layouts = f"{self.spec.conv_layout.value} and {self.spec.state_layout.value}"
            raise InputError(
                f"{name} has shape {shape_text(value.shape)}, needs "
                f"{shape_text(('slots', *shape))} in the layouts {layouts}"
            )
        self.dtype_and_device(name, value, dtypes)
        self.writable(name, value)

    def kept(
        self,
        name: str,
        value: Tensor,
        slots: int,
        shape: tuple[int, ...],
        dtypes: Sequence[torch.dtype],
    ) -> None:
        """Check what is kept of at least ``slots`` slots, of ``shape`` each."""
        needed = (max(slots, 1), *shape)
        fits = value.dim() == len(needed) and value.shape[1:] == needed[1:]
        if not fits or len(value) < slots:
            raise InputError(
                f"{name} has shape {shape_text(value.shape)}, needs {shape_text(needed)}"
            )
        self.dtype_and_device(name, value, dtypes)
        self.writable(name, value)

    def indices(
        self, name: str, value: Tensor, count: int, dtypes: Sequence[torch.dtype] = INTEGERS
    ) -> list[int]:
        """Return the first ``count`` entries of an index tensor, or of one of flags."""
        if value.dim() != 1 or len(value) < count:
            got = shape_text(value.shape)
            raise InputError(f"{name} is {got}, needs one axis of at least {count}")
        self.dtype_and_device(name, value, dtypes)
        entries: list[int] = value[:count].tolist()
        return entries

    def slots(
        self,
        name: str,
        value: Tensor,
        count: int,
        num_slots: int,
        used: Sequence[bool] | None = None,
    ) -> list[int]:
        """Return the first ``count`` slots of an index tensor; those not ``used`` may be any."""
        entries = self.indices(name, value, count)
        pad = self.spec.pad_slot
        for i, slot in enumerate(entries):
            if slot >= num_slots and (used is None or used[i]):
                raise InputError(
                    f"{name}[{i}] is {slot}, needs a slot below {num_slots}, or {pad} or less "
                    "for padding"
                )
        return entries

    def targets(self, value: Tensor | None, source: list[int], num_slots: int) -> list[int]:
        """Return the slots written."""
        if value is None:
            return source
        return self.slots("out_state_indices", value, len(source), num_slots, self.live(source))

    def live(self, slots: Sequence[int]) -> list[bool]:
        """Return which slots are not padding."""
        return [slot > self.spec.pad_slot for slot in slots]

    def exclusive(
        self,
        live: Sequence[bool],
        source: Sequence[int],
        target: Sequence[int],
        *,
        pad: int | None = None,
    ) -> None:
        """Refuse two rows that write one slot, and a row that reads what another writes."""
        pad = self.spec.pad_slot if pad is None else pad
        writer: dict[int, int] = {}
        for i, slot in enumerate(target):
            if live[i] and slot > pad and writer.setdefault(slot, i) != i:
                raise InputError(
                    f"rows {writer[slot]} and {i} both write slot {slot}, needs one writer a slot"
                )
        for i, slot in enumerate(source):
            if live[i] and writer.get(slot, i) != i:
                raise InputError(
                    f"row {i} reads slot {slot}, which row {writer[slot]} writes: needs "
                    "separate slots"
                )

    def lengths(self, cu_seqlens: Tensor, rows: int | None) -> list[int]:
        """Return the lengths of packed sequences."""
        offsets = self.indices("cu_seqlens", cu_seqlens, max(1, cu_seqlens.numel()))
        lengths = [end - start for start, end in pairwise(offsets)]
        if offsets[0] != 0 or min(lengths, default=0) < 0:
            raise InputError(f"cu_seqlens is {offsets}, needs 0 first and no step back")
        if rows is not None and offsets[-1] > rows:
            raise InputError(f"cu_seqlens ends at {offsets[-1]}, needs at most the {rows} rows")
        return lengths


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.stride() == other.stride()


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Return whether two batches share an element: of packed rows, only the columns count."""
    if not one.numel() or not other.numel() or one.device != other.device:
        return False
    pair = (one, other)
    starts = [x.data_ptr() for x in pair]
    rows = [x.stride(0) * x.element_size() for x in pair]
    widths = [_extent(x[0]) * x.element_size() for x in pair]
    ends = [s + (len(x) - 1) * r + w for s, x, r, w in zip(starts, pair, rows, widths, strict=True)]
    if ends[0] <= starts[1] or ends[1] <= starts[0]:
        return False
    if rows[0] != rows[1] or max(widths) > rows[0]:
        return True
    column = (starts[1] - starts[0]) % rows[0]
    return column < widths[0] or column + widths[1] > rows[0]


def _extent(x: Tensor) -> int:
    return 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))


def shape_text(sizes: Sequence[object]) -> str:
    """Write sizes as a tuple."""
    return f"({', '.join(str(size) for size in sizes)})"
