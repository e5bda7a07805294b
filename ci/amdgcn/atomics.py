# SPDX-License-Identifier: Apache-2.0
"""Atomics of global memory: lanes and waves take their turns, in order of their numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ci.amdgcn.assembly import Instruction
from ci.amdgcn.float_formats import from_bfloat16, to_bfloat16
from ci.amdgcn.memory_instructions import (
    Addresses,
    buffer_addresses,
    chosen_lanes,
    global_addresses,
)
from ci.amdgcn.operands import Execute
from ci.amdgcn.waves import Array, Dtype, Waves

f16, f32, i32, i64, u16, u32, u64 = (
    np.float16, np.float32, np.int32, np.int64, np.uint16, np.uint32, np.uint64,
)  # fmt: skip

# the new value, from the old one, the lane's, and what a swap compares with
Update = Callable[[Any, Any, Any], Any]


class Atomic(NamedTuple):
    """The type of a value in memory, and how it changes."""

    dtype: Dtype
    update: Update


def _add_bfloat16(old: Array, value: Array, _: Any) -> Array:
    return to_bfloat16(from_bfloat16(old) + from_bfloat16(value)).astype(u16)


def _integers(unsigned: Dtype, signed: Dtype) -> dict[str, Atomic]:
    return {
        "add": Atomic(unsigned, lambda old, value, _: old + value),
        "sub": Atomic(unsigned, lambda old, value, _: old - value),
        "and": Atomic(unsigned, lambda old, value, _: old & value),
        "or": Atomic(unsigned, lambda old, value, _: old | value),
        "xor": Atomic(unsigned, lambda old, value, _: old ^ value),
        "swap": Atomic(unsigned, lambda old, value, _: value),
        "cmpswap": Atomic(unsigned, lambda old, value, other: value if old == other else old),
        "umax": Atomic(unsigned, lambda old, value, _: max(old, value)),
        "umin": Atomic(unsigned, lambda old, value, _: min(old, value)),
        "smax": Atomic(signed, lambda old, value, _: max(old, value)),
        "smin": Atomic(signed, lambda old, value, _: min(old, value)),
    }


ATOMICS: dict[str, Atomic] = {
    **_integers(u32, i32),
    **{f"{name}_x2": atomic for name, atomic in _integers(u64, i64).items()},
    "add_f32": Atomic(f32, lambda old, value, _: old + value),
    "pk_add_f16": Atomic(f16, lambda old, value, _: old + value),
    "pk_add_bf16": Atomic(u16, _add_bfloat16),
}


def decode_atomic(instruction: Instruction) -> Execute:
    """Return what executes ``buffer_atomic_...`` and ``global_atomic_...``."""
    found = re.fullmatch(r"(buffer|global|flat)_atomic_(\w+)", instruction.name)
    if found is None or found[2] not in ATOMICS:
        raise instruction.unknown()
    returns = "sc0" in instruction.flags
    operands = instruction.operands
    if found[1] == "buffer":
        addresses = buffer_addresses(instruction, operands[1:])
        target = source = operands[0].register
    else:
        target = operands[0].register
        address, value, *base = operands[1:] if returns else operands
        source = value.register
        addresses = global_addresses(instruction, address, base)
    count = 2 if found[2].endswith("_x2") else 1
    compares = found[2].startswith("cmpswap")
    return _execute(
        addresses, ATOMICS[found[2]], count, source, target if returns else None, compares
    )


def _execute(
    addresses: Addresses,
    atomic: Atomic,
    count: int,
    source: int,
    target: int | None,
    compares: bool,
) -> Execute:
    def execute(waves: Waves) -> None:
        places, mask = addresses(waves)
        lanes = chosen_lanes(mask)
        places = places.reshape(-1)[lanes]
        values = _values(waves, source, count, lanes)
        others = _values(waves, source + count, count, lanes) if compares else values
        old = np.zeros_like(values)
        for buffer, offsets, chosen in waves.memory.find(places, 4 * count, "atomic"):
            buffer.note_update(offsets, 4 * count)
            turns = zip(np.arange(len(values))[chosen], offsets >> 2, strict=True)
            for lane, cell in turns:
                memory = buffer.words[cell : cell + count]
                old[lane] = memory
                pieces = (x.view(atomic.dtype) for x in (memory, values[lane], others[lane]))
                for place, value, other in zip(*(_each(x) for x in pieces), strict=True):
                    place[...] = atomic.update(place[()], value[()], other[()])
        if target is not None:
            for k in range(count):
                waves.vectors[u32][target + k].reshape(-1)[lanes] = old[:, k]

    return execute


def _each(x: Array) -> list[Array]:
    """Return every element of an array, to be written."""
    return [x[k : k + 1].reshape(()) for k in range(len(x))]


def _values(waves: Waves, register: int, count: int, lanes: Array | slice) -> Array:
    rows = waves.vectors[u32][register : register + count]
    return np.stack([row.reshape(-1)[lanes] for row in rows], axis=1)
