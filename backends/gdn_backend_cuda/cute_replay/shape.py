# SPDX-License-Identifier: Apache-2.0
"""What the kernel is compiled for, where things lie in shared memory, and what it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

# what an instruction takes and gives: of one thread in the kernel, an array of lanes in NumPy
Value = Any

K = V = 128
P = ROOM = 16  # drafts of a step, and those that are pending, at most
W = 4
TERMS = 3
LOG2_E = 1.4426950408889634

X_ROW = 288  # bytes; 32 beyond a row's: no two lanes of a load use one bank
V_ROW = 272  # bytes
ROWS = 16  # of V, of which a tile has all of K
SHARED = 228 * 1024  # bytes of an SM, for all its blocks
DRIVERS = 1024  # of them for each block


@dataclass(frozen=True, slots=True)
class Shape:
    """What is known when the kernel is compiled, and where things are in shared memory."""

    H: int
    HV: int
    dtype: str  # of activations: bfloat16 or float16
    state: str  # its dtype: float32, bfloat16 or float16
    pad_slot: int
    scale: float
    has_norm: bool
    has_silu: bool
    has_bias: bool
    has_accepted: bool
    float32_dt_bias: bool
    drafts: int  # of a sequence: 1 to P
    room: int  # for drafts that are pending: drafts to ROOM
    warps: int  # of a block: 4 or 8, no fewer than value heads of a key head
    blocks: int  # that an SM is to hold

    @property
    def is_float32(self) -> bool:
        """Whether the state is, and not of 16 bits."""
        return self.state == "float32"

    @property
    def heads(self) -> int:
        """Value heads of a key head."""
        return self.HV // self.H

    @property
    def tile(self) -> int:
        """Bytes of a tile of the state."""
        return ROWS * K * (4 if self.is_float32 else 2)

    @property
    def parts(self) -> int:
        """Tiles of a head that a warp owns."""
        return V // (ROWS * self.warps)

    @property
    def tiles(self) -> int:
        """Tiles that a warp owns."""
        return self.heads * self.parts

    @property
    def group(self) -> int:
        """Rows of X for what is pending; as many are for new keys, and for queries."""
        return 4 if self.room <= 4 else 8 if self.room <= 8 else 16

    @property
    def keys(self) -> int:
        """Rows of X for keys."""
        return 2 * self.group

    @property
    def x_rows(self) -> int:
        """Rows of X, the last of which are queries."""
        return 16 if self.group == 4 else 3 * self.group

    @property
    def octets(self) -> int:
        """Tiles of 8 rows that X has of a kind; 4 of a kind share one with others."""
        return -(-self.group // 8)

    @property
    def values(self) -> int:
        """Where the values start behind X."""
        return self.x_rows * X_ROW

    @property
    def solved(self) -> int:
        """Where what is solved of the heads starts behind X."""
        return self.values + self.heads * self.keys * V_ROW

    @property
    def term(self) -> int:
        """Bytes of a term of what D sums: a row of all keys for what is pending and for queries."""
        return 2 * self.keys * 2 * self.group

    @property
    def decay_at(self) -> int:
        """Where the decays of X's rows are in what is solved of a head.

        They are behind the terms, and behind what the substitution has in their place before: rows
        of keys, then tiles of queries.
        """
        return max(TERMS * self.term, (self.keys + 8 * self.octets) * self.keys * 4)

    @property
    def left_at(self) -> int:
        """Where what is left of each pending key is."""
        return self.decay_at + self.x_rows * 4

    @property
    def whole_at(self) -> int:
        """Where what is left of the state is."""
        return self.left_at + 8 * self.octets * 4

    @property
    def solved_size(self) -> int:
        """Bytes that are solved of a head."""
        return -(-(self.whole_at + 4) // 128) * 128

    @property
    def depth(self) -> int:
        """Tiles that a warp holds at a time: all that it owns, or as many as fit."""
        rest = self.solved + self.heads * self.solved_size
        rest += 8 * (self.warps * self.tiles + 1)
        most = SHARED // self.blocks - DRIVERS - rest
        return min(most // (self.warps * self.tile), self.tiles)

    @property
    def gathered_at(self) -> int:
        """Where X starts; the warps' stages are in front, the values and the solved behind."""
        return self.warps * self.depth * self.tile

    @property
    def barriers_at(self) -> int:
        """Where the barriers of the stages start, warp by warp."""
        return self.gathered_at + self.solved + self.heads * self.solved_size

    @property
    def is_solved_at(self) -> int:
        """Where the barrier of what is solved is."""
        return self.barriers_at + self.warps * self.depth * 8

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self.is_solved_at + 8


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
