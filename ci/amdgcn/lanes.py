# SPDX-License-Identifier: Apache-2.0
"""Instructions that move values between the lanes of a wave."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from ci.amdgcn.assembly import Instruction
from ci.amdgcn.operands import Execute, scalar_source, write
from ci.amdgcn.permutation import quad_permutation
from ci.amdgcn.waves import LANE, Array, Waves

u32 = np.uint32


def _read_first_lane(instruction: Instruction) -> Execute:
    target, source = (operand.register for operand in instruction.operands)

    def execute(waves: Waves) -> None:
        # lane 0 where no lane is enabled
        first = waves.active.argmax(axis=1)
        value = waves.vectors[u32][source]
        waves.write_scalar(target, value[np.arange(len(waves)), first])

    return execute


def _lane_number(instruction: Instruction) -> Callable[[Waves], Array]:
    read = scalar_source(instruction, instruction.operands[2], u32)
    return lambda waves: np.broadcast_to(read(waves) & u32(63), (len(waves),)).astype(np.int64)


def _read_lane(instruction: Instruction) -> Execute:
    target, source = (operand.register for operand in instruction.operands[:2])
    lane = _lane_number(instruction)
    return lambda waves: waves.write_scalar(
        target, waves.vectors[u32][source][np.arange(len(waves)), lane(waves)]
    )


def _write_lane(instruction: Instruction) -> Execute:
    target = instruction.operands[0].register
    value = scalar_source(instruction, instruction.operands[1], u32)
    lane = _lane_number(instruction)

    def execute(waves: Waves) -> None:
        waves.vectors[u32][target][np.arange(len(waves)), lane(waves)] = value(waves)

    return execute


def _swap_rows(width: int) -> Callable[[Instruction], Execute]:
    """Swap the upper rows of one register with the lower rows of the other."""
    upper = LANE // width % 2 == 1
    from_upper, from_lower = LANE[upper], LANE[~upper]

    def decode(instruction: Instruction) -> Execute:
        first, second = (operand.register for operand in instruction.operands)

        def execute(waves: Waves) -> None:
            x, y = waves.vectors[u32][first], waves.vectors[u32][second]
            kept = x[:, from_upper]
            x[:, from_upper] = y[:, from_lower]
            y[:, from_lower] = kept

        return execute

    return decode


def _pull(instruction: Instruction) -> Execute:
    """Decode ``ds_bpermute_b32``: every lane reads the lane that it names; disabled ones are 0."""
    target, address, source = (operand.register for operand in instruction.operands)
    offset = u32(instruction.integer("offset"))

    def execute(waves: Waves) -> None:
        lane = (((waves.vectors[u32][address] + offset) >> u32(2)) & u32(63)).astype(np.int64)
        value = waves.vectors[u32][source]
        if not waves.all_active:
            value = np.where(waves.active, value, u32(0))
        write(waves, target, np.take_along_axis(value, lane, axis=1))

    return execute


def _push(instruction: Instruction) -> Execute:
    """Decode ``ds_permute_b32``: every lane writes the lane that it names; the last one wins."""
    target, address, source = (operand.register for operand in instruction.operands)
    offset = u32(instruction.integer("offset"))

    def execute(waves: Waves) -> None:
        lane = ((waves.vectors[u32][address] + offset) >> u32(2)) & u32(63)
        wave, sender = np.nonzero(waves.active)
        result = np.zeros(waves.active.shape, u32)
        result[wave, lane[wave, sender]] = waves.vectors[u32][source][wave, sender]
        write(waves, target, result)

    return execute


def _swizzle(instruction: Instruction) -> Execute:
    target, source = (operand.register for operand in instruction.operands)
    lanes = _swizzle_lanes(instruction)

    def execute(waves: Waves) -> None:
        value = waves.vectors[u32][source]
        if not waves.all_active:
            value = np.where(waves.active, value, u32(0))
        write(waves, target, value[:, lanes])

    return execute


def _swizzle_lanes(instruction: Instruction) -> Array:
    offset = instruction.modifiers.get("offset", 0)
    if isinstance(offset, int):
        if offset & 0x8000:
            return quad_permutation(tuple(offset >> 2 * k & 3 for k in range(4)))
        kept, set_bits, flipped = offset & 31, offset >> 5 & 31, offset >> 10 & 31
        return (LANE & 32) | ((LANE & kept | set_bits) ^ flipped)
    _, kind, *words = re.findall(r"\w+", str(offset))
    numbers = tuple(int(word) for word in words if word.isdecimal())
    if kind == "SWAP":
        return LANE ^ numbers[0]
    if kind == "REVERSE":
        return LANE ^ (numbers[0] - 1)
    if kind == "BROADCAST":
        return (LANE & ~(numbers[0] - 1)) + numbers[1]
    if kind == "QUAD_PERM":
        return quad_permutation(numbers)
    raise instruction.unknown(str(offset))


LANE_INSTRUCTIONS: dict[str, Callable[[Instruction], Execute]] = {
    "v_readfirstlane_b32": _read_first_lane,
    "v_readlane_b32": _read_lane,
    "v_writelane_b32": _write_lane,
    "v_permlane16_swap_b32": _swap_rows(16),
    "v_permlane32_swap_b32": _swap_rows(32),
    "ds_bpermute_b32": _pull,
    "ds_permute_b32": _push,
    "ds_swizzle_b32": _swizzle,
}
