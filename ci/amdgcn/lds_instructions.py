# SPDX-License-Identifier: Apache-2.0
"""Loads and stores of shared memory by lanes."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from ci.amdgcn.assembly import Instruction
from ci.amdgcn.memory_instructions import LOADS, Access
from ci.amdgcn.operands import Execute, write
from ci.amdgcn.waves import LANE, Array, Waves

_NAME = re.compile(r"ds_(read|write)_(\w+)")

u8, u16, u32 = np.uint8, np.uint16, np.uint32

READS = {
    "b32": Access(4),
    "b64": Access(8),
    "b96": Access(12),
    "b128": Access(16),
    "u16": LOADS["ushort"],
    "i16": LOADS["sshort"],
    "u8": LOADS["ubyte"],
    "i8": LOADS["sbyte"],
    "u16_d16": LOADS["short_d16"],
    "u16_d16_hi": LOADS["short_d16_hi"],
    "u8_d16": LOADS["ubyte_d16"],
    "u8_d16_hi": LOADS["ubyte_d16_hi"],
}
WRITES = {
    "b32": Access(4),
    "b64": Access(8),
    "b96": Access(12),
    "b128": Access(16),
    "b16": Access(2),
    "b8": Access(1),
    "b16_d16_hi": Access(2, half=1),
    "b8_d16_hi": Access(1, half=1),
}


def smallest_access(names: Iterable[str]) -> int:
    """Return the bytes that LDS accesses are multiples of: 1, 2 or 4."""
    sizes = [
        access.size
        for name in names
        if (found := _NAME.fullmatch(name))
        and (access := (READS if found[1] == "read" else WRITES).get(found[2]))
    ]
    return min([4, *sizes])


def decode_lds(instruction: Instruction) -> Execute:
    """Return what executes a ``ds_`` instruction."""
    name = instruction.name
    if found := re.fullmatch(r"ds_read_b64_tr_b(8|16)", name):
        return _read_transposed(instruction, int(found[1]) // 8)
    if found := re.fullmatch(r"ds_(read|write)2(st64)?_b(32|64)", name):
        size = int(found[3]) // 8
        step = size * (64 if found[2] else 1)
        offsets = tuple(u32(instruction.integer(f"offset{i}") * step) for i in (0, 1))
        decode_two = _read_two if found[1] == "read" else _write_two
        return decode_two(instruction, size, offsets)
    found = _NAME.fullmatch(name)
    access = (READS if found[1] == "read" else WRITES).get(found[2]) if found else None
    if found is None or access is None:
        raise instruction.unknown()
    return _read(instruction, access) if found[1] == "read" else _write(instruction, access)


def _read(instruction: Instruction, access: Access) -> Execute:
    target, address = (operand.register for operand in instruction.operands)
    offset = u32(instruction.integer("offset"))

    def execute(waves: Waves) -> None:
        words = waves.lds.load(waves, waves.vectors[u32][address] + offset, access.size)
        for k, word in enumerate(words):
            if access.size < 4:
                old = waves.vectors[u32][target + k]
                word = access.to_register(word, old.reshape(-1)[_lanes(waves)])
            _assign(waves, target + k, word)

    return execute


def _write(instruction: Instruction, access: Access) -> Execute:
    address, source = (operand.register for operand in instruction.operands)
    offset = u32(instruction.integer("offset"))
    count = max(1, access.size // 4)
    shift = u32(16 if access.half else 0)

    def execute(waves: Waves) -> None:
        words = _words(waves, source, count)
        if shift:
            words = [words[0] >> shift]
        waves.lds.store(waves, waves.vectors[u32][address] + offset, words, access.size)

    return execute


def _read_two(instruction: Instruction, size: int, offsets: tuple[np.uint32, ...]) -> Execute:
    target, address = (operand.register for operand in instruction.operands)
    count = size // 4

    def execute(waves: Waves) -> None:
        # both before either is written: the address may be in a target
        start = waves.vectors[u32][address]
        words = [word for offset in offsets for word in waves.lds.load(waves, start + offset, size)]
        for k in range(2 * count):
            _assign(waves, target + k, words[k])

    return execute


def _write_two(instruction: Instruction, size: int, offsets: tuple[np.uint32, ...]) -> Execute:
    address, *data = (operand.register for operand in instruction.operands)

    def execute(waves: Waves) -> None:
        start = waves.vectors[u32][address]
        for offset, source in zip(offsets, data, strict=True):
            waves.lds.store(waves, start + offset, _words(waves, source, size // 4), size)

    return execute


def _read_transposed(instruction: Instruction, element: int) -> Execute:
    """Read 8 bytes a lane; each 16 lanes then hold the transpose of what they read."""
    target, address = (operand.register for operand in instruction.operands)
    offset = u32(instruction.integer("offset"))
    count = 8 // element  # elements a lane reads
    lane = LANE[:, None]
    step = np.arange(count)
    from_lane = (lane & ~15) + 16 // count * step + (lane & 15) // count
    from_element = np.broadcast_to((lane & 15) % count, from_lane.shape)

    def execute(waves: Waves) -> None:
        words = waves.lds.load(waves, waves.vectors[u32][address] + offset, 8)
        loaded = np.zeros((len(waves), len(LANE), 2), u32)
        loaded[waves.active] = np.stack(words, axis=1)
        elements = loaded.view(u8 if element == 1 else u16)
        moved = np.ascontiguousarray(elements[:, from_lane, from_element]).view(u32)
        for k in range(2):
            write(waves, target + k, moved[..., k])

    return execute


def _lanes(waves: Waves) -> Array | slice:
    return slice(None) if waves.all_active else np.flatnonzero(waves.active)


def _words(waves: Waves, register: int, count: int) -> list[Array]:
    lanes = _lanes(waves)
    return [row.reshape(-1)[lanes] for row in waves.vectors[u32][register : register + count]]


def _assign(waves: Waves, register: int, word: Array) -> None:
    waves.vectors[u32][register].reshape(-1)[_lanes(waves)] = word
