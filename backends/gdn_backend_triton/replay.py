# SPDX-License-Identifier: Apache-2.0
"""Verification by replay: pending drafts are applied and new ones run while the state is read once.

The rows of X are the keys that are pending, the new keys, and the new queries; the product of the
state with X gives everything that depends on the state, the rest is an R x R problem per head. With
c the norms' inverses, G the sums of g along the path to a row, and a row's ancestors "above" it::

    E_ij = c_i c_j (X X^T)_ij exp(G_i - G_j)     for j above i
    D    = (I + beta E)^-1 beta (v - Y)          Y_i = S X_i c_i exp(G_i)
    o_i  = Y_i + sum_j E_ij D_j                  i a query, j its key and the keys above
    S    = exp(G_n) S + sum_j D_j X_j c_j exp(G_n - G_j)     j the pending keys, n the last of them

The first kernel, see ``replay_inputs``, gathers X and v and solves the R x R problem of every head,
so that D and what it adds to o are a product with one matrix. The second one reads, uses and writes
the state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_backend_triton.launch import (
    STEP_SIZES,
    STEP_TENSORS,
    ceil_div,
    power_of_two,
)
from gdn_backend_triton.launches import Launch
from gdn_backend_triton.maths import rounded, upper_half
from gdn_backend_triton.replay_inputs import place, prepare
from gdn_backend_triton.taps import strides
from gdn_portable.errors import UnsupportedCallError
from gdn_portable.metadata import Drafts, ReplayDrafts, VerifyMetadata
from gdn_portable.spec import Device, GdnSpec

MOST_DRAFTS = 31  # of a tree


class Tile(NamedTuple):
    """What one program does: ``rows`` rows of V, ``chunk`` of K at a time."""

    rows: int
    chunk: int
    width: int  # neighbours in a row of the state that a thread loads, see _interleave
    warps: int

    def fit(self, K: int, V: int) -> Tile:
        """Return it with fewer rows where K is large, and no more of anything than there is."""
        rows, chunk = self.rows * 128 // max(K, 128), min(self.chunk, K)
        return Tile(min(max(rows, 16), V), chunk, min(self.width, chunk // 4), self.warps)


class Tiles(NamedTuple):
    """Of one architecture."""

    prepare_warps: int
    by_itemsize: dict[int, tuple[tuple[float, Tile], ...]]
    wide: tuple[tuple[float, Tile], ...]


# by architecture; then by bytes of a state's element, the most sequences times value heads, and the
# tile; or, for more than 32 rows of X, by the most of them
TILES: dict[str, Tiles] = {
    # H200, H16/HV32, K = V = 128, P = 4, 3 replayed, with the conv: 16.7 / 51.3 / 181 us at B = 8 /
    # 32 / 128 with a float32 state, 11.6 / 33.5 / 114 with bfloat16
    "cuda": Tiles(
        2,
        {
            4: ((256, Tile(32, 16, 4, 1)), (float("inf"), Tile(16, 16, 4, 1))),
            2: ((float("inf"), Tile(16, 32, 8, 1)),),
        },
        # P = 16, B = 8 and 32: 47.6 and 160 us with a float32 state, 40.3 and 129 with bfloat16; by
        # one warp, which spills, 68 and 231, 51 and 167
        ((64, Tile(32, 64, 8, 4)), (float("inf"), Tile(16, 32, 8, 8))),
    ),
    "rocm": Tiles(
        2,
        {
            4: ((float("inf"), Tile(32, 64, 2, 2)),),
            2: ((float("inf"), Tile(32, 64, 2, 2)),),
        },
        ((float("inf"), Tile(16, 64, 2, 2)),),
    ),
}
# with 64 rows a warp group shares a product. H200, P = 16, B = 8 / 32 / 128: 41.5 / 131 / 466 us
# with a float32 state, 33.5 / 110 / 400 with bfloat16
TILES["sm90"] = TILES["cuda"]._replace(
    wide=((64, Tile(64, 32, 8, 4)), *TILES["cuda"].wide[1:]),
)


@triton.jit
def _dot_terms(S, X, y, TERMS: tl.constexpr, PRECISION: tl.constexpr):
    """Return S X + y in float32 precision, X being exact in what it is multiplied in.

    Args:
        S: float32.
        X: in the activations' dtype.
        y: float32.
        TERMS: of S in X's dtype, 3 in bfloat16 alone; -2 for two of TF32, 0 for one of float32.
        PRECISION: of a product of float32.
    """
    if TERMS == -2:
        # 11 bits of a float32 rounded are exact in TF32, the rest fits another but for 2 bits
        X = X.to(tl.float32)
        term = (S.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
        term = term.to(tl.float32, bitcast=True)
        y = tl.dot(term, X, y, input_precision="tf32")
        y = tl.dot(S - term, X, y, input_precision="tf32")
    elif TERMS == 0:
        y = tl.dot(S, X.to(tl.float32), y, input_precision=PRECISION)
    elif TERMS == 3:
        for _ in tl.static_range(3):
            term, S = upper_half(S)
            y = tl.dot(term, X, y)
    else:
        term = rounded(S, X.dtype)
        y = tl.dot(term, X, y)
        for _ in tl.static_range(TERMS - 1):
            S -= term.to(tl.float32)
            term = rounded(S, X.dtype)
            y = tl.dot(term, X, y)
    return y


@triton.jit
def _load(pointers, step, mask, COUNT: tl.constexpr):
    """Return COUNT tiles, ``step`` elements apart, each its own tensor: few registers at a time."""
    tiles = ()
    for n in tl.static_range(COUNT):
        tiles = tiles + (tl.load(pointers + n * step, mask=mask, other=0.0),)
    return tiles


@triton.jit
def _zeros(pointers, COUNT: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros(pointers.shape, pointers.dtype.element_ty),)
    return tiles


@triton.jit
def _fetch_state(state, step, there, CHUNKS: tl.constexpr):
    """Load chunks of K where ``there``, which is true, see :func:`_fetch_inputs`."""
    S = _zeros(state, CHUNKS)
    if there:
        S = _load(state, step, there, CHUNKS)
    return S


@triton.jit
def _fetch_inputs(
    X, X_step, X_mask, solved, solved_step, solved_mask, values, values_mask, there,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """Load all that was prepared where ``there``, which is true.

    The compiler puts what follows a load right behind it, and so would wait for one after the
    other; it moves nothing into a branch.
    """
    X_chunks = _zeros(X, CHUNKS)
    terms = _zeros(solved, 3)
    v = tl.zeros(values.shape, values.dtype.element_ty)
    if there:
        X_chunks = _load(X, X_step, X_mask, CHUNKS)
        terms = _load(solved, solved_step, solved_mask, 3)
        v = tl.load(values, mask=values_mask, other=0.0)
    return X_chunks, terms, v


@triton.jit
def _interleave(x, WIDTH: tl.constexpr):
    """Return each 4 * WIDTH columns in the order that a tensor core wants.

    A thread that loaded WIDTH neighbouring columns of one row then holds what it must have of the
    operand and of the accumulator, and nothing moves between threads. A WIDTH of 2 changes nothing.
    """
    if WIDTH == 2:
        return x
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    x = tl.reshape(x, (ROWS, COLUMNS // (4 * WIDTH), 4, WIDTH // 2, 2))
    return tl.reshape(tl.permute(x, (0, 1, 3, 2, 4)), (ROWS, COLUMNS))


@triton.jit
def _deinterleave(x, WIDTH: tl.constexpr):
    """Undo :func:`_interleave`."""
    if WIDTH == 2:
        return x
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    x = tl.reshape(x, (ROWS, COLUMNS // (4 * WIDTH), WIDTH // 2, 4, 2))
    return tl.reshape(tl.permute(x, (0, 1, 3, 2, 4)), (ROWS, COLUMNS))


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def _replay(
    state, state_indices, num_accepted, cu_seqlens, rows_of_X, values, solution, out, B, T,
    state_s, state_h, state_v, state_k, indices_b, accepted_b, cu_b, out_t, out_h, out_v,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, P: tl.constexpr,
    ROOM: tl.constexpr, R: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr, TERMS: tl.constexpr,
    UPDATE_TERMS: tl.constexpr, PRECISION: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = V // BV
    KEYS: tl.constexpr = ROOM + P
    CHUNKS: tl.constexpr = K // BK
    part = tl.program_id(0) % PARTS
    head = tl.program_id(0) // PARTS % HV
    sequence = tl.program_id(0) // (PARTS * HV)
    o_v = part * BV + tl.arange(0, BV)[:, None]
    slot, pending, row, count = place(
        state_indices, num_accepted, cu_seqlens, indices_b, accepted_b, cu_b, sequence, B, T,
        P, ROOM, PAD,
    )  # fmt: skip
    out += head * out_h + o_v * out_v
    if slot <= PAD:
        if OVERLAPS:
            # or a batch of padding alone would end before the kernel in front of it does
            tl.extra.cuda.gdc_wait()
        zeros = tl.zeros([BV, 16], out.dtype.element_ty)
        for t in range(0, count, 16):
            token = t + tl.arange(0, 16)[None, :]
            tl.store(out + (row + token) * out_t, zeros, mask=token < count)
        return

    there = slot > PAD
    count = tl.minimum(count, P)
    r = tl.arange(0, R)[:, None]
    c = tl.arange(0, R)[None, :]
    o_k = tl.arange(0, BK)[None, :]
    state += slot * state_s + head * state_h + o_v * state_v + o_k * state_k
    S = _fetch_state(state, BK * state_k, there, CHUNKS)
    if OVERLAPS:
        # nothing above was the kernel's before
        tl.extra.cuda.gdc_wait()
    # transposed: of the state's shape and order, X would be given the state's vectors
    rows_of_X += (sequence.to(tl.int64) * H + head // (HV // H)) * (R * K)
    rows_of_X += tl.arange(0, BK)[:, None] + c * K
    values += (sequence.to(tl.int64) * (KEYS * HV) + head) * V + o_v + c * (HV * V)
    solution += (sequence * HV + head).to(tl.int64) * SIZE
    decay = tl.load(solution + c, mask=c < KEYS + P, other=0.0)
    left = tl.load(solution + R + c, mask=c < ROOM, other=0.0)
    decay_left = tl.load(solution + R + ROOM)
    solved = (solution + 2 * R).to(tl.pointer_type(tl.bfloat16), bitcast=True) + c * R + r
    is_solved = (r < KEYS) & ((c < ROOM) | ((c >= KEYS) & (c < KEYS + P)))
    X, solved, v = _fetch_inputs(
        rows_of_X, BK, c < KEYS + P, solved, R * R, is_solved, values, c < KEYS, there, CHUNKS
    )

    Y = tl.zeros([BV, R], tl.float32)
    for n in tl.static_range(CHUNKS):
        chunk = _interleave(S[n], WIDTH).to(tl.float32)
        Y = _dot_terms(chunk, X[n], Y, TERMS, PRECISION)
    Y *= decay
    rest = v.to(tl.float32) - Y
    D = tl.zeros([BV, R], tl.float32)
    for i in tl.static_range(3):
        term, rest = upper_half(rest)
        for j in tl.static_range(3 - i):
            D = tl.dot(term, solved[j], D)
    o = Y + D
    is_query = (c >= KEYS) & (c < KEYS + count)
    out += (row + c - KEYS) * out_t
    tl.store(out, o.to(out.dtype.element_ty), mask=is_query)
    if pending > 0:
        D *= left
        for n in tl.static_range(CHUNKS):
            updated = _interleave(S[n], WIDTH).to(tl.float32) * decay_left
            updated = _dot_terms(D, tl.trans(X[n]), updated, UPDATE_TERMS, PRECISION)
            updated = _deinterleave(rounded(updated, state.dtype.element_ty), WIDTH)
            tl.store(state + n * BK * state_k, updated)


class Convolution(NamedTuple):
    """What a step's convolution needs besides its input."""

    weight: Tensor
    bias: Tensor | None
    conv_state: Tensor


def make_replay(spec: GdnSpec, device: Device, *, deterministic: bool) -> Callable[..., None]:
    """Return what launches the kernels."""
    H, HV, K, V = spec.num_k_heads, spec.num_v_heads, spec.head_k_dim, spec.head_v_dim
    W, PAD = spec.conv_width, spec.pad_slot
    prepare_warps, by_itemsize, wide = TILES.get(device.arch, TILES[device.kind])
    narrow = by_itemsize[4 if spec.state_dtype is torch.float32 else 2]
    terms, update_terms = _terms(spec, device)
    precision = "tf32x3" if device.kind == "cuda" else "ieee"
    prepare_kernel = functools.cache(
        lambda R: Launch(prepare, device, num_warps=prepare_warps if R == 16 else 8, num_stages=1)
    )
    replay_kernel = functools.cache(
        lambda warps: Launch(_replay, device, num_warps=warps, num_stages=1)
    )
    parts = H + ceil_div(HV * V, 2 * K)
    group = power_of_two(HV // H)

    @functools.cache
    def fit(P: int, room: int, heads: int) -> tuple[tuple[int, ...], Tile]:
        R = max(16, power_of_two(room + 2 * P))
        sizes = P, room, R, power_of_two(room + P)
        tiles, size = (wide, R) if R > 32 else (narrow, 1 << 30 if deterministic else heads)
        return sizes, next(tile for most, tile in tiles if size <= most).fit(K, V)

    def launch(
        q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor,
        state: Tensor, *, metadata: VerifyMetadata, drafts: ReplayDrafts, out: Tensor,
        convolution: Convolution | None = None,
    ) -> None:  # fmt: skip
        """Launch; with a convolution its input, [T, D], is passed as each of q, k and v."""
        P, T, cu, parents = metadata.max_drafts, out.shape[0], metadata.cu_seqlens, metadata.parents
        B = T // P if cu is None else cu.shape[0] - 1
        sequences = B if cu is None else B + 1
        if sequences == 0:
            return
        sizes, (rows, chunk, width, warps) = fit(P, drafts.k.shape[1], B * HV)
        _, room, R, RK = sizes
        size = 2 * R + 3 * R * R // 2 + R * RK
        X = torch.empty(B * H * R * K, dtype=q.dtype, device=q.device)
        values = torch.empty(B * (room + P) * HV * V, dtype=q.dtype, device=q.device)
        solution = torch.empty(B * HV * size, dtype=torch.float32, device=q.device)
        indices, accepted = metadata.state_indices, metadata.num_accepted
        batch = indices.stride(0), *strides(accepted, 1), *strides(cu, 1)
        weight, bias, conv_state = convolution or (None, None, None)
        qkv = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], 1)
        if convolution is not None:
            qkv = (q.stride(0), 0, 0, 0, 0, 0, q.stride(1))
        if B:
            prepare_kernel(R)(
                B * parts,
                (q, k, v, weight, bias, conv_state, drafts.conv_inputs, a, b, A_log, dt_bias,
                 indices, accepted, cu, parents, drafts.k, drafts.v, drafts.g, drafts.beta, X,
                 values, solution),
                (B, T),
                (spec.q_scale, *qkv, *strides(weight, 2), *strides(bias, 1),
                 *strides(conv_state, 3), *drafts.conv_inputs.stride(), *a.stride(), *b.stride(),
                 A_log.stride(0), dt_bias.stride(0), *batch, *strides(parents, 2),
                 *drafts.k.stride(), *drafts.v.stride(), *drafts.g.stride(),
                 *drafts.beta.stride(), H, HV, K, V, W, *sizes, power_of_two(P), group, size,
                 width, PAD, spec.qk_l2norm, spec.activation == "silu", precision),
            )  # fmt: skip
        replay_kernel(warps)(
            sequences * HV * (V // rows),
            (state, indices, accepted, cu, X, values, solution, out),
            (B, T),
            (*state.stride(), *batch, *out.stride(), H, HV, K, V, P, room, R, rows, chunk, size,
             width, PAD, terms, update_terms, precision),
        )  # fmt: skip

    return launch


def refuse_large_trees(metadata: VerifyMetadata, drafts: Drafts | None) -> None:
    """Raise where a path through a tree would not fit into the bits of an int32.

    Raises:
        UnsupportedCallError: replay is asked for a tree of more than 31 drafts.
    """
    if isinstance(drafts, ReplayDrafts) and metadata.is_tree and metadata.max_drafts > MOST_DRAFTS:
        raise UnsupportedCallError(
            f"max_drafts of a tree is {metadata.max_drafts}, needs at most {MOST_DRAFTS} for replay"
        )


def _terms(spec: GdnSpec, device: Device) -> tuple[int, int]:
    """Return how the state and its change are multiplied with X, as ``_dot_terms`` takes it."""
    terms = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 1}[spec.state_dtype]
    has_exact_tf32 = device.kind == "cuda" and spec.dtype is not torch.float32
    if spec.dtype is torch.bfloat16:
        return terms, max(terms, 2)
    change = -2 if has_exact_tf32 else 0
    return (1 if spec.dtype is spec.state_dtype is torch.float16 else change), change
