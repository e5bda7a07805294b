# SPDX-License-Identifier: Apache-2.0
"""Runs a block of a kernel in PTX: warps take turns at random, bulk copies land when they may.

It has barriers in shared memory, named barriers and bulk copies; what orders memory between threads
and units it takes for granted. No two lanes may store different numbers at one place of shared
memory at once: which of them is loaded is anybody's guess.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.cute_lanes import Space
from tests.ptx_arithmetic import (
    KINDS,
    Array,
    compute,
    from_bfloat16,
    matrix_product,
    to_bfloat16,
    to_float16,
)
from tests.ptx_program import Operand, Program, Statement

WARP = 32
MOST_STEPS = 600  # of a warp in its turn
LANDING = 0.15  # how often a copy lands between two turns
NEVER = 300  # turns in which nothing happens, and nothing will


class DeadlockError(Exception):
    """No warp can go on, and no copy is on its way."""


@dataclass(eq=False)
class Barrier:
    """A barrier in shared memory."""

    count: int
    arrivals: int = 0  # that are awaited
    bytes: int = 0  # likewise
    phase: int = 0

    def __post_init__(self) -> None:
        self.arrivals = self.count

    def change(self, *, arrivals: int = 0, size: int = 0) -> None:
        self.arrivals += arrivals
        self.bytes += size
        assert self.arrivals >= 0, "more arrive than a barrier awaits"
        if not self.arrivals and not self.bytes:
            self.phase ^= 1
            self.arrivals = self.count


@dataclass(frozen=True)
class Copy:
    """A bulk copy on its way: to shared memory with a barrier, or of a warp's group."""

    source: int
    target: int
    size: int
    barrier: Barrier | None
    warp: Warp


@dataclass
class Named:
    """A barrier of a block's that has a number."""

    waiting: int = 0
    generation: int = 0


@dataclass
class Block:
    """A block of a grid, run to its end by :meth:`run`."""

    program: Program
    parameters: Sequence[int]
    memory: Space
    shared: Space
    threads: int
    index: int
    grid: int
    rng: random.Random
    waits: bool = True  # for the kernel in front, before it touches global memory
    barriers: dict[int, Barrier] = field(default_factory=dict)
    named: dict[int, Named] = field(default_factory=dict)
    copies: list[Copy] = field(default_factory=list)

    def run(self) -> None:
        """Run all warps.

        Raises:
            DeadlockError: they wait for what will not happen.
        """
        warps, idle = [Warp(self, n) for n in range(self.threads // WARP)], 0
        while any(warp.is_alive for warp in warps):
            if self.copies and (self.rng.random() < LANDING or idle > NEVER):
                self._land(self.copies.pop(self.rng.randrange(len(self.copies))))
                idle = 0
            warp = self.rng.choice([warp for warp in warps if warp.is_alive])
            idle = 0 if warp.run(self.rng.randrange(1, MOST_STEPS)) else idle + 1
            if idle > NEVER and not self.copies:
                raise DeadlockError(f"warps wait at {[w.place for w in warps if w.is_alive]}")
        while self.copies:
            self._land(self.copies.pop())

    def _land(self, copy: Copy) -> None:
        if copy.barrier is None:
            self._move(self.shared, copy.source, self.memory, copy.target, copy.size)
            copy.warp.copies -= 1
        else:
            self._move(self.memory, copy.source, self.shared, copy.target, copy.size)
            copy.barrier.change(size=-copy.size)

    def _move(self, source: Space, at: int, target: Space, to: int, size: int) -> None:
        steps = np.arange(0, size, 16)  # what bulk copies are aligned to
        target.data[target.at(to + steps, 16)] = source.data[source.at(at + steps, 16)]


class Warp:
    """The lanes of a warp; those at the statement furthest in front go first."""

    def __init__(self, block: Block, number: int) -> None:
        self.block = block
        self.registers: dict[str, Array] = {
            "%tid.x": np.arange(WARP, dtype=np.uint64) + np.uint64(number * WARP),
            "%ctaid.x": np.full(WARP, block.index, np.uint64),
            "%nctaid.x": np.full(WARP, block.grid, np.uint64),
        }
        self.at = np.zeros(WARP, np.int64)
        self.is_live = np.ones(WARP, bool)
        self.copies = 0  # to global memory that have not landed
        self.generation: int | None = None  # of the named barrier that it waits at
        self.begins = not block.waits  # after the kernel in front of this one

    @property
    def is_alive(self) -> bool:
        return bool(self.is_live.any())

    @property
    def place(self) -> int:
        return int(self.at[self.is_live].min())

    def run(self, most: int) -> bool:
        """Run until something has to be waited for; return whether anything was done."""
        for done in range(most):
            if not self.is_alive:
                return True
            place = self.place
            active = self.is_live & (self.at == place)
            statement = self.block.program.statements[place]
            mask = active
            if statement.guard is not None:
                mask = active & (self._bits(statement.guard) != statement.is_negated)
            if self._waits(statement, mask):
                return done > 0
            self.at[active] = place + 1
            if statement.op.startswith("bra"):
                self.at[mask] = self.block.program.labels[str(statement.operands[0])]
            elif statement.op == "ret":
                assert not self.copies, "a warp that ends does not wait for its copies"
                self.is_live &= ~mask
            elif mask.any():
                self._do(statement.op.split("."), statement.operands, mask)
            else:
                # what a load that is skipped leaves there is anything
                self._fill(statement)
        return True

    def _waits(self, statement: Statement, mask: Array) -> bool:
        """Return whether a statement has to be tried again later."""
        op, operands = statement.op, statement.operands
        if not mask.any():
            return False
        if "wait_group" in op:
            return self.copies > 0
        if "try_wait" in op:
            (barrier,) = {self.block.barriers[at] for at in self._addresses(operands[1], mask)}
            (phase,) = set(self._get(operands[2], np.uint32)[mask].tolist())
            return barrier.phase == phase
        if op.startswith("bar.sync"):
            assert mask.all(), "part of a warp at a barrier"
            return self._meets(*(int(str(operand)) for operand in operands))
        return False

    def _meets(self, number: int, threads: int = 0) -> bool:
        """Arrive at a named barrier once; return whether others have yet to."""
        named = self.block.named.setdefault(number, Named())
        if self.generation is None:
            self.generation = named.generation
            named.waiting += WARP
            if named.waiting == (threads or self.block.threads):
                named.waiting, named.generation = 0, named.generation + 1
        if self.generation == named.generation:
            return True
        self.generation = None
        return False

    def _bits(self, name: str) -> Array:
        return self.registers[name].astype(bool)

    def _get(self, operand: Operand, kind: Any) -> Array:
        name = str(operand)
        if name in self.registers:
            bits = self.registers[name]
        elif name.startswith(("__dynamic_shmem", "global_smem")):
            bits = np.zeros(WARP, np.uint64)
        else:
            number = int(name[2:], 16) if name.startswith("0f") else int(name.rstrip("U"), 0)
            bits = np.full(WARP, number & (2**64 - 1), np.uint64)
        return bits.astype(f"u{np.dtype(kind).itemsize}").view(kind)

    def _put(self, operand: Operand, x: Array, mask: Array) -> None:
        name, x = str(operand), np.ascontiguousarray(np.broadcast_to(x, (WARP,)))
        bits = x.view(f"u{x.dtype.itemsize}").astype(np.uint64)
        self.registers[name] = np.where(mask, bits, self.registers.get(name, bits))

    def _fill(self, statement: Statement) -> None:
        target = statement.operands[0] if statement.operands else ""
        if statement.op.startswith("ld.") and target not in self.registers:
            self._put(target, np.full(WARP, 0xDEAD, np.uint32), np.ones(WARP, bool))

    def _addresses(self, operand: Operand, mask: Array) -> list[int]:
        name, _, offset = str(operand)[1:-1].partition("+")
        found: list[int] = (self._get(name, np.int64)[mask] + int(offset or 0)).tolist()
        return found

    def _do(self, parts: list[str], operands: Sequence[Operand], mask: Array) -> None:
        name, kind = parts[0], KINDS.get(parts[-1])
        if name == "griddepcontrol":
            self.begins = True
        elif name in ("fence", "bar") or parts[-1] in ("commit_group", "0"):
            assert name != "bar" or mask.all(), "part of a warp at a barrier"
        elif name == "mbarrier" and "try_wait" in parts:
            self._put(operands[0], np.ones(WARP, np.uint32), mask)
        elif name == "mbarrier":
            self._signal(parts, operands, mask)
        elif parts[:3] == ["cp", "async", "bulk"]:
            if "wait_group" not in parts:
                self._copy(operands, mask, is_fetch=parts[3].startswith("shared"))
        elif name == "ld" and parts[1] == "param":
            at = self.block.program.parameters.index(str(operands[1])[1:-1])
            number = self.block.parameters[at] & (2**64 - 1)
            self._put(operands[0], np.full(WARP, number, np.uint64), mask)
        elif name in ("ld", "st"):
            self._access(name == "ld", parts[1], operands, kind, mask)
        elif name == "mma":
            assert mask.all(), "part of a warp at a product of matrices"
            a, b, c = (x if isinstance(x, tuple) else (x,) for x in operands[1:])
            words = [[self._get(x, np.uint32) for x in each] for each in (a, b)]
            sums = matrix_product(*words, [self._get(x, np.float32) for x in c], parts[-2])
            for target, x in zip(operands[0], sums, strict=True):
                self._put(target, x, mask)
        elif name == "mov" and isinstance(operands[0], tuple):
            word, bits = self._get(operands[1], np.uint64), int(parts[1][1:]) // len(operands[0])
            for n, target in enumerate(operands[0]):
                self._put(target, (word >> np.uint64(bits * n)).astype(f"u{bits // 8}"), mask)
        elif name in ("ldmatrix", "stmatrix"):
            assert mask.all(), "part of a warp moves matrices"
            self._move_matrices(name == "ldmatrix", "trans" in parts, operands)
        else:
            self._put(operands[0], self._computed(parts, operands, kind), mask)

    def _computed(self, parts: list[str], operands: Sequence[Operand], kind: Any) -> Array:
        name, given = parts[0], operands[1:]
        if name == "shfl":
            lane = self._get(given[1], np.uint32).astype(int) & (WARP - 1)
            lane = {"idx": lane, "bfly": np.arange(WARP) ^ lane}[parts[2]]
            return self._get(given[0], np.uint32)[lane]
        if name == "mov" and isinstance(given[0], tuple):
            bits = int(parts[1][1:]) // len(given[0])
            numbers = (self._get(x, f"u{bits // 8}").astype(np.uint64) for x in given[0])
            word = sum(x << np.uint64(bits * n) for n, x in enumerate(numbers))
            return np.asarray(word).astype(kind)
        if name == "cvt" and parts[-1] == "bf16":
            return from_bfloat16(self._get(given[0], np.uint16))
        if name == "cvt" and parts[-2] == "bf16":
            return to_bfloat16(self._get(given[0], np.float32)).astype(np.uint16)
        if name == "selp":
            yes, no = (self._get(x, kind) for x in given[:2])
            return np.where(self._bits(str(given[2])), yes, no)
        if name == "cvt" and parts[2] in ("bf16x2", "f16x2"):
            rounded = to_bfloat16 if parts[2] == "bf16x2" else to_float16
            high, low = (rounded(self._get(x, np.float32)) for x in given)
            return high << np.uint32(16) | low
        if name == "cvt" and "sat" in parts:
            return np.nan_to_num(np.clip(self._get(given[0], np.float32), 0, 1))
        if name == "cvt":
            return self._get(given[0], kind).astype(KINDS[parts[-2]])
        if "wide" in parts:
            wide = {np.int32: np.int64, np.uint32: np.uint64}[kind]
            factors = [self._get(x, kind).astype(wide) for x in given[:2]]
            return compute(parts, [*factors, *(self._get(x, wide) for x in given[2:])])
        return compute(parts, [self._get(x, kind) for x in given])

    def _signal(self, parts: list[str], operands: Sequence[Operand], mask: Array) -> None:
        barriers = self.block.barriers
        if "init" in parts:
            counts = self._get(operands[1], np.uint32)[mask].tolist()
            for at, count in zip(self._addresses(operands[0], mask), counts, strict=True):
                barriers[at] = Barrier(count)
            return
        sizes = [0] * int(mask.sum())
        if "expect_tx" in parts:
            sizes = self._get(operands[2], np.uint32)[mask].tolist()
        for at, size in zip(self._addresses(operands[1], mask), sizes, strict=True):
            barriers[at].change(arrivals=-1, size=size)

    def _copy(self, operands: Sequence[Operand], mask: Array, *, is_fetch: bool) -> None:
        assert self.begins, "a copy does not wait for the kernel in front"
        target, source = (self._addresses(operand, mask) for operand in operands[:2])
        size = self._get(operands[2], np.uint32)[mask].tolist()
        barriers: list[Barrier | None] = [None] * len(size)
        if is_fetch:
            barriers = [self.block.barriers[at] for at in self._addresses(operands[3], mask)]
        else:
            self.copies += len(size)
        for each in zip(source, target, size, barriers, strict=True):
            self.block.copies.append(Copy(*each, self))

    def _access(
        self, loads: bool, space: str, operands: Sequence[Operand], kind: Any, mask: Array
    ) -> None:
        assert self.begins or space != "global", "an access does not wait for the kernel in front"
        memory = self.block.memory if space == "global" else self.block.shared
        words, where = operands if loads else reversed(operands)
        words = words if isinstance(words, tuple) else (words,)
        address, size = np.array(self._addresses(where, mask)), np.dtype(kind).itemsize
        assert not (address % (size * len(words))).any(), "an address is not aligned"
        for n, word in enumerate(words):
            at = memory.at(address + n * size, size)
            if loads:
                x = np.zeros(WARP, kind)
                x[mask] = np.ascontiguousarray(memory.data[at]).view(kind)[:, 0]
                self._put(word, x, mask)
            else:
                x = np.ascontiguousarray(self._get(word, kind)[mask])
                self._store(memory, at, x)

    def _move_matrices(self, loads: bool, turns: bool, operands: Sequence[Operand]) -> None:
        """Move matrices of 8 x 8 halves of words: a lane has where a row is, and two of a row.

        Where they are transposed, two of a column.
        """
        words, where = operands if loads else reversed(operands)
        words = words if isinstance(words, tuple) else (words,)
        every, lane = np.ones(WARP, bool), np.arange(WARP)
        rows = np.array(self._addresses(where, every))
        for n, word in enumerate(words):
            x = np.zeros(WARP, np.uint32) if loads else self._get(word, np.uint32)
            for half in range(2):
                row, column = lane // 4, lane % 4 * 2 + half
                if turns:
                    row, column = column, row
                at, shift = self.block.shared.at(rows[8 * n + row] + column * 2, 2), 16 * half
                if loads:
                    loaded = np.ascontiguousarray(self.block.shared.data[at]).view(np.uint16)
                    x |= loaded[:, 0].astype(np.uint32) << np.uint32(shift)
                else:
                    self._store(self.block.shared, at, (x >> np.uint32(shift)).astype(np.uint16))
            if loads:
                self._put(word, x, every)

    def _store(self, memory: Space, at: Array, x: Array) -> None:
        stored = x[:, None].view(np.uint8).reshape(at.shape)
        memory.data[at] = stored
        if memory is self.block.shared:
            assert (memory.data[at] == stored).all(), "lanes store different numbers at one place"
