# SPDX-License-Identifier: Apache-2.0
"""What the kernel is compiled for, where things lie in shared memory, and what it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

# what an instruction takes and gives: of one thread in the kernel, an array of lanes in NumPy
Value = Any

K = V = 128
P = ROOM = 4
KEYS = P + ROOM
W = 4
TERMS = 3
LOG2_E = 1.4426950408889634

X_ROW = 288  # bytes; 32 beyond a row's: no two lanes of a load use one bank
V_ROW = 272  # bytes
ROWS = 16  # of V, what a warp owns of every head
CONSUMERS = V // ROWS
SOLVERS = 4  # warps
MOST_SHARED = 227 * 1024
MOST_STAGES = 4

SCRATCH = 128  # a solver warp's own words: rows 0..7 and 8..15 of what the substitution takes
# what is solved of a head, in bytes
DECAY, LEFT, SOLVED = 3 * 128, 3 * 128 + 64, 512


@dataclass(frozen=True, slots=True)
class Shape:
    """What is known when the kernel is compiled, and where things are in shared memory."""

    H: int
    HV: int
    is_float32: bool  # the state; else bfloat16
    pad_slot: int
    scale: float
    has_norm: bool
    has_silu: bool
    has_bias: bool
    has_accepted: bool
    float32_dt_bias: bool

    @property
    def heads(self) -> int:
        """Value heads of a key head."""
        return self.HV // self.H

    @property
    def tile(self) -> int:
        """Bytes of what a warp owns of a head's state."""
        return ROWS * K * (4 if self.is_float32 else 2)

    @property
    def values(self) -> int:
        """Where a buffer's values start."""
        return 16 * X_ROW

    @property
    def solved(self) -> int:
        """Where a buffer's solved heads start."""
        return self.values + self.heads * KEYS * V_ROW

    @property
    def buffer(self) -> int:
        """Bytes of all that is known of an item before its state is."""
        return self.solved + self.heads * SOLVED

    @property
    def depth(self) -> int:
        """Stages of a warp's ring."""
        rest = MOST_SHARED - 1024 - 2 * self.buffer - SOLVERS * SCRATCH * 4
        most = rest // (CONSUMERS * self.tile)
        return min(MOST_STAGES, most)

    @property
    def buffers_at(self) -> int:
        """Where the two buffers start; the rings are in front of them."""
        return CONSUMERS * self.depth * self.tile

    @property
    def scratch_at(self) -> int:
        """Where the solvers' own memory starts."""
        return self.buffers_at + 2 * self.buffer

    @property
    def barriers_at(self) -> int:
        """Where the barriers start: of the stages, then those of each buffer, in their order."""
        return self.scratch_at + SOLVERS * SCRATCH * 4

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self.barriers_at + 8 * (CONSUMERS * self.depth + 7)


class Tensors(NamedTuple):
    """Addresses, then strides in bytes; slots and rows of tokens come first."""

    state: Value
    mixed: Value
    weight: Value
    bias: Value
    window: Value
    inputs: Value
    a: Value
    b: Value
    A_log: Value
    dt_bias: Value
    kept_k: Value
    kept_v: Value
    kept_g: Value
    kept_beta: Value
    out: Value
    state_s: Value
    state_h: Value
    mixed_t: Value
    mixed_d: Value
    weight_d: Value
    weight_w: Value
    bias_d: Value
    window_s: Value
    window_d: Value
    window_l: Value
    inputs_s: Value
    inputs_p: Value
    a_t: Value
    a_h: Value
    b_t: Value
    b_h: Value
    kept_k_s: Value
    kept_k_p: Value
    kept_k_h: Value
    kept_v_s: Value
    kept_v_p: Value
    kept_v_h: Value
    kept_g_s: Value
    kept_g_p: Value
    kept_g_h: Value
    kept_beta_s: Value
    kept_beta_p: Value
    kept_beta_h: Value
    out_t: Value
    out_h: Value


class Item(NamedTuple):
    """A sequence and a key head."""

    slot: Value
    pending: Value
    row: Value  # the first of its tokens
    head: Value
