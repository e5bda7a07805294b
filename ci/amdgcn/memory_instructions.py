# SPDX-License-Identifier: Apache-2.0
"""Loads and stores of global memory by lanes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ci.amdgcn.assembly import M0, Instruction, Operand
from ci.amdgcn.operands import Execute, scalar_source
from ci.amdgcn.waves import LANE, Array, Waves

u16, u32, u64 = np.uint16, np.uint32, np.uint64
ADDRESS_BITS = u64((1 << 48) - 1)


@dataclass(frozen=True, slots=True)
class Access:
    """How many bytes a load or store moves, and which part of a register they are."""

    size: int
    signed: bool = False
    half: int | None = None  # 0 or 1: only that half of the register

    def to_register(self, word: Array, old: Array) -> Array:
        """Return a register after a load of less than a word."""
        if self.signed:
            sign = u32(1 << (8 * self.size - 1))
            word = (word ^ sign) - sign
        if self.half == 0:
            return (word & u32(0xFFFF)) | (old & u32(0xFFFF0000))
        if self.half == 1:
            return (word << u32(16)) | (old & u32(0xFFFF))
        return word


WORDS = {
    "dword": Access(4),
    "dwordx2": Access(8),
    "dwordx3": Access(12),
    "dwordx4": Access(16),
}
LOADS = {
    **WORDS,
    "ushort": Access(2),
    "sshort": Access(2, signed=True),
    "ubyte": Access(1),
    "sbyte": Access(1, signed=True),
    "short_d16": Access(2, half=0),
    "short_d16_hi": Access(2, half=1),
    "ubyte_d16": Access(1, half=0),
    "ubyte_d16_hi": Access(1, half=1),
    "sbyte_d16": Access(1, signed=True, half=0),
    "sbyte_d16_hi": Access(1, signed=True, half=1),
}
STORES = {
    **WORDS,
    "short": Access(2),
    "byte": Access(1),
    "short_d16_hi": Access(2, half=1),
    "byte_d16_hi": Access(1, half=1),
}

# addresses [waves, lanes] as uint64, and which lanes access them
Addresses: TypeAlias = Callable[[Waves], tuple[Array, Array]]


def decode_memory(instruction: Instruction) -> Execute:
    """Return what executes ``buffer_load_...``, ``global_store_...`` and their like."""
    found = re.fullmatch(r"(buffer|global|flat)_(load|store)_(\w+)", instruction.name)
    if found is None:
        raise instruction.unknown()
    access = (LOADS if found[2] == "load" else STORES).get(found[3])
    if access is None:
        raise instruction.unknown()
    is_buffer = found[1] == "buffer"
    if "lds" in instruction.flags:
        if not is_buffer or found[2] != "load":
            raise instruction.unknown("lds")
        return _load_to_lds(instruction, access)
    if is_buffer:
        register = instruction.operands[0].register
        addresses = buffer_addresses(instruction, instruction.operands[1:])
    else:
        first, second, *base = instruction.operands
        register, address = (
            (first.register, second) if found[2] == "load" else (second.register, first)
        )
        addresses = global_addresses(instruction, address, base)
    if found[2] == "store":
        return _store(addresses, register, access)
    return _load(addresses, register, access, zero_outside=is_buffer)


def buffer_addresses(instruction: Instruction, operands: tuple[Operand, ...]) -> Addresses:
    """Return the addresses of a buffer: a descriptor in four scalar registers, and offsets.

    Lanes whose offset is past the descriptor's size access nothing.
    """
    offset, descriptor, more = operands
    if "idxen" in instruction.flags or descriptor.kind != "scalar":
        raise instruction.unknown("addressing")
    base = descriptor.register // 2
    scalar_offset = scalar_source(instruction, more, u32)
    constant = u64(instruction.integer("offset"))
    by_lane = "offen" in instruction.flags

    def addresses(waves: Waves) -> tuple[Array, Array]:
        start = (waves.scalars[u64][base] & ADDRESS_BITS) + scalar_offset(waves)
        size = waves.scalars[u32][descriptor.register + 2][:, None]
        if by_lane:
            lane_offset = waves.vectors[u32][offset.register].astype(u64)
            if constant:
                lane_offset += constant
        else:
            lane_offset = np.full((len(waves), len(LANE)), constant)
        inside = lane_offset < size
        if not waves.all_active:
            inside &= waves.active
        lane_offset += start[:, None]
        return lane_offset, inside

    return addresses


def global_addresses(instruction: Instruction, address: Operand, base: list[Operand]) -> Addresses:
    """Return the addresses in registers: 64 bits by lane, or 32 on top of a scalar base."""
    constant = u64(instruction.integer("offset") & (1 << 64) - 1)
    if base and base[0].kind == "scalar":
        start = base[0].register // 2

        def addresses(waves: Waves) -> tuple[Array, Array]:
            lane_offset = waves.vectors[u32][address.register].astype(u64)
            return lane_offset + (waves.scalars[u64][start] + constant)[:, None], waves.active

    else:

        def addresses(waves: Waves) -> tuple[Array, Array]:
            return waves.vector_pair(address.register) + constant, waves.active

    return addresses


def chosen_lanes(mask: Array) -> Array | slice:
    """Return the places where a mask is set, in an array of all lanes of all waves."""
    return slice(None) if mask.all() else np.flatnonzero(mask)


def _load(addresses: Addresses, register: int, access: Access, *, zero_outside: bool) -> Execute:
    def execute(waves: Waves) -> None:
        places, mask = addresses(waves)
        lanes = chosen_lanes(mask)
        words = waves.memory.load(places.reshape(-1)[lanes], access.size)
        for k, word in enumerate(words):
            target = waves.vectors[u32][register + k]
            if access.size < 4:
                word = access.to_register(word, target.reshape(-1)[lanes])
            target.reshape(-1)[lanes] = word
            if zero_outside and not isinstance(lanes, slice):
                target[waves.active & ~mask] = 0

    return execute


def _store(addresses: Addresses, register: int, access: Access) -> Execute:
    count = max(1, access.size // 4)
    shift = u32(16 if access.half else 0)

    def execute(waves: Waves) -> None:
        places, mask = addresses(waves)
        lanes = chosen_lanes(mask)
        rows = waves.vectors[u32][register : register + count]
        words = [row.reshape(-1)[lanes] >> shift for row in rows]
        waves.memory.store(places.reshape(-1)[lanes], words, access.size)

    return execute


def _load_to_lds(instruction: Instruction, access: Access) -> Execute:
    """Decode a load that goes to LDS, to M0 + offset + lane * size."""
    addresses = buffer_addresses(instruction, instruction.operands)
    constant = instruction.integer("offset")
    if access.size < 4:
        raise instruction.unknown("lds")

    def execute(waves: Waves) -> None:
        places, mask = addresses(waves)
        inside = np.flatnonzero(mask)
        loaded = waves.memory.load(places.reshape(-1)[inside], access.size)
        start = (waves.scalars[u32][M0] & u32(0x3FFFF)) + u32(constant)
        targets = start[:, None] + (LANE * access.size).astype(u32)
        active = np.flatnonzero(waves.active)
        words = []
        for word in loaded:
            everywhere = np.zeros(mask.size, u32)
            everywhere[inside] = word
            words.append(everywhere[active])
        waves.lds.store(waves, targets, words, access.size)

    return execute
