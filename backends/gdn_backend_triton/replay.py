# SPDX-License-Identifier: Apache-2.0
"""Verification by replay: pending drafts are applied and new ones run while the state is read once.

The rows of X are the keys that are pending, the new keys, and the new queries; the product of the
state with X gives everything that depends on the state, the rest is an R x R problem per head. With
c the norms' inverses, G the sums of g along the path to a row, and a row's ancestors "above" it::

    E_ij = c_i c_j (X X^T)_ij exp(G_i - G_j)     for j above i
    D    = (I + beta E)^-1 beta (v - Y)          Y_i = S X_i c_i exp(G_i)
    o_i  = Y_i + sum_j E_ij D_j                  i a query, j its key and the keys above
    S    = exp(G_n) S + sum_j D_j X_j c_j exp(G_n - G_j)     j the pending keys, n the last of them

The first kernel solves the R x R problem of every head, so that D and what it adds to o are a
product with one matrix, and gathers X: what is pending is replaced only once it has been read. The
second one reads, uses and writes the state. The inverse is exact doubling of its diagonal blocks: a
Neumann series fails where a token repeats.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_backend_triton.launch import FP_FUSION, STEP_SIZES, STEP_TENSORS, power_of_two
from gdn_backend_triton.maths import gates, silu
from gdn_backend_triton.taps import strides
from gdn_portable.errors import InputError
from gdn_portable.metadata import Drafts, ReplayDrafts, VerifyMetadata
from gdn_portable.spec import Device, GdnSpec

MOST_DRAFTS = 31  # of a tree


class Tile(NamedTuple):
    """What one program does: ``rows`` rows of V, ``chunk`` of K at a time."""

    rows: int
    chunk: int
    warps: int


# by architecture and bytes of a state's element: the most sequences times value heads, and the tile
TILES: dict[str, dict[int, tuple[tuple[float, Tile], ...]]] = {
    # H200, H16/HV32, K = V = 128, P = 4, 3 replayed, with the conv: 23 / 68 / 232 us at B = 8 / 32
    # / 128 with a float32 state, 18 / 45 / 154 with bfloat16
    "cuda": {
        4: ((256, Tile(128, 32, 4)), (1024, Tile(32, 32, 2)), (float("inf"), Tile(64, 32, 4))),
        2: ((256, Tile(32, 32, 2)), (float("inf"), Tile(128, 32, 4))),
    },
    "rocm": {
        4: ((float("inf"), Tile(32, 64, 2)),),
        2: ((float("inf"), Tile(32, 64, 2)),),
    },
}


@triton.jit
def _dot_terms(S, X, y, TERMS: tl.constexpr, PRECISION: tl.constexpr):
    """Return S X + y in float32 precision, X being exact in what it is multiplied in.

    Args:
        S: float32.
        X: in the activations' dtype.
        y: float32.
        TERMS: of S in X's dtype; -2 for two terms of TF32, 0 for one of float32.
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
    else:
        term = S.to(X.dtype)
        y = tl.dot(term, X, y)
        for _ in tl.static_range(TERMS - 1):
            S = S - term.to(tl.float32)
            term = S.to(X.dtype)
            y = tl.dot(term, X, y)
    return y


@triton.jit
def _fetch(pointers, mask, there):
    """Load where ``there``, which is true: behind a branch, loads are not waited for one by one.

    The compiler moves a change of layout up to the load that it can reach.
    """
    x = tl.zeros(pointers.shape, pointers.dtype.element_ty)
    if there:
        x = tl.load(pointers, mask=mask, other=0.0)
    return x


@triton.jit
def _fetch_chunks(pointers, step, mask, there, CHUNKS: tl.constexpr):
    """Return chunks of K, ``step`` elements apart, each its own tensor: few registers at a time."""
    chunks = ()
    for n in tl.static_range(CHUNKS):
        chunks = chunks + (_fetch(pointers + n * step, mask, there),)
    return chunks


@triton.jit
def _double(inverse, A, r, c, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """Return the inverses of diagonal blocks twice as large."""
    below = tl.where((r // (2 * BLOCK) == c // (2 * BLOCK)) & (r // BLOCK != c // BLOCK), A, 0.0)
    below = tl.dot(inverse, below, input_precision=PRECISION)
    return inverse - tl.dot(below, inverse, input_precision=PRECISION)


@triton.jit
def _inverse(A, r, c, KEYS: tl.constexpr, PRECISION: tl.constexpr):
    """Return (I + A)^-1 of A strictly lower triangular in its first KEYS rows, zero below."""
    inverse = tl.where(r == c, 1.0, 0.0) - tl.where(r // 2 == c // 2, A, 0.0)
    if KEYS > 2:
        inverse = _double(inverse, A, r, c, 2, PRECISION)
    if KEYS > 4:
        inverse = _double(inverse, A, r, c, 4, PRECISION)
    if KEYS > 8:
        inverse = _double(inverse, A, r, c, 8, PRECISION)
    if KEYS > 16:
        inverse = _double(inverse, A, r, c, 16, PRECISION)
    if KEYS > 32:
        inverse = _double(inverse, A, r, c, 32, PRECISION)
    if KEYS > 64:
        inverse = _double(inverse, A, r, c, 64, PRECISION)
    return inverse


@triton.jit
def _path(parents, parents_p, draft, count, P: tl.constexpr):
    """Return as bits which drafts lie between the root and each of ``draft``, both included."""
    at = tl.where((draft >= 0) & (draft < count), draft, -1)
    path = tl.where(at >= 0, 1 << tl.maximum(at, 0), 0)
    for _ in range(1, P):
        parent = tl.load(parents + at * parents_p, mask=at > 0, other=0).to(tl.int32)
        at = tl.where(at > 0, tl.minimum(tl.maximum(parent, 0), at - 1), -1)
        path |= tl.where(at >= 0, 1 << tl.maximum(at, 0), 0)
    return path


@triton.jit
def _place(
    state_indices, num_accepted, cu_seqlens, indices_b, accepted_b, cu_b, sequence, B, T,
    P: tl.constexpr, ROOM: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Return a sequence's slot, how many drafts are pending in it, its first row and its rows.

    Sequence B is the rows of nobody, which are padding.
    """
    is_sequence = sequence < B
    slot = tl.load(state_indices + sequence * indices_b, mask=is_sequence, other=PAD).to(tl.int64)
    pending = sequence * 0
    if num_accepted is not None:
        pending = tl.load(num_accepted + sequence * accepted_b, mask=is_sequence, other=0)
        pending = tl.minimum(pending.to(tl.int32), ROOM)
    start = sequence * P
    count = start * 0 + P
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + sequence * cu_b).to(tl.int32)
        end = tl.load(cu_seqlens + (sequence + 1) * cu_b, mask=is_sequence, other=T).to(tl.int32)
        count = end - start
    return slot, pending, start.to(tl.int64), count


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def _solve(
    q, k, a, b, A_log, dt_bias, state_indices, num_accepted, cu_seqlens, parents,
    kept_k, kept_g, kept_beta, rows_of_X, solution, scale, B, T,
    q_t, q_h, k_t, k_h, a_t, a_h, b_t, b_h, A_log_h, dt_bias_h, indices_b, accepted_b, cu_b,
    parents_b, parents_p, kept_k_s, kept_k_p, kept_k_h, kept_k_k, kept_g_s, kept_g_p, kept_g_h,
    kept_beta_s, kept_beta_p, kept_beta_h,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, P: tl.constexpr, ROOM: tl.constexpr,
    R: tl.constexpr, RK: tl.constexpr, RQ: tl.constexpr, PAD: tl.constexpr, NORM: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr, WAIT: tl.constexpr, K_START: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    KEYS: tl.constexpr = ROOM + P
    head = tl.program_id(0) % HV
    sequence = tl.program_id(0) // HV
    key_head = head // (HV // H)
    slot, pending, row, count = _place(
        state_indices, num_accepted, cu_seqlens, indices_b, accepted_b, cu_b, sequence, B, T,
        P, ROOM, PAD,
    )  # fmt: skip
    if slot <= PAD:
        if WAIT:
            # or a batch of padding alone would end before the convolution does
            tl.extra.cuda.gdc_wait()
        return
    there = slot > PAD
    count = tl.minimum(count, P)
    r1 = tl.arange(0, RK)
    r = r1[:, None]
    c = r1[None, :]
    t1 = tl.arange(0, RQ)
    o_k = tl.arange(0, K)[None, :]
    j = r1 - ROOM
    is_old = r1 < pending
    is_key = (j >= 0) & (j < count)

    kept_g += slot * kept_g_s + head * kept_g_h
    kept_beta += slot * kept_beta_s + head * kept_beta_h
    g_old = tl.load(kept_g + r1 * kept_g_p, mask=is_old, other=0.0)
    beta_old = tl.load(kept_beta + r1 * kept_beta_p, mask=is_old, other=0.0)
    kept_k += slot * kept_k_s + key_head * kept_k_h + o_k * kept_k_k
    old_k = _fetch(kept_k + r * kept_k_p, is_old[:, None], there)
    a += row * a_t + head * a_h
    b += row * b_t + head * b_h
    g, beta = gates(
        tl.load(a + j * a_t, mask=is_key, other=0.0),
        tl.load(b + j * b_t, mask=is_key, other=0.0),
        tl.load(A_log + head * A_log_h),
        tl.load(dt_bias + head * dt_bias_h),
    )
    # other threads may store what a thread has yet to load
    tl.debug_barrier()
    tl.store(kept_g + j * kept_g_p, g, mask=is_key)
    tl.store(kept_beta + j * kept_beta_p, beta, mask=is_key)
    g = tl.where(is_key, g, g_old)
    beta = tl.where(is_key, beta, beta_old)
    above = c <= r
    above_query = c <= ROOM + t1[:, None]
    if parents is not None:
        parents += sequence.to(tl.int64) * parents_b
        drafted = tl.maximum(j, 0)[None, :]
        path = _path(parents, parents_p, j, count, P)
        above &= (c < ROOM) | ((path[:, None] >> drafted) & 1 == 1)
        path = _path(parents, parents_p, t1, count, P)
        above_query &= (c < ROOM) | ((path[:, None] >> drafted) & 1 == 1)
    G = tl.sum(tl.where(above, g[None, :], 0.0), 1)
    G_query = tl.sum(tl.where(above_query, g[None, :], 0.0), 1)
    G_old = tl.sum(tl.where(r1 < ROOM, g, 0.0))

    if WAIT:
        # q and k are the convolution's; nothing before was
        tl.extra.cuda.gdc_wait()
    k += row * k_t + K_START + key_head * k_h + o_k
    q += row * q_t + key_head * q_h + o_k
    keys = old_k + _fetch(k + (r - ROOM) * k_t, is_key[:, None], there)
    queries = _fetch(q + t1[:, None] * q_t, (t1 < count)[:, None], there)
    rows_of_X += (sequence.to(tl.int64) * H + key_head) * (R * K) + o_k
    if head % (HV // H) == 0:
        tl.store(rows_of_X + r * K, keys, mask=r < KEYS)
        tl.store(rows_of_X + (KEYS + t1[:, None]) * K, queries, mask=t1[:, None] < P)
    products = tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
    products_query = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    norm = tl.full([RK], 1.0, tl.float32)
    norm_query = tl.full([RQ], 1.0, tl.float32) * scale
    if NORM:
        norm = tl.rsqrt(tl.sum(tl.where(r == c, products, 0.0), 1) + 1e-6)
        square = queries.to(tl.float32)
        norm_query *= tl.rsqrt(tl.sum(square * square, 1) + 1e-6)
    # sums of g between two rows, not differences of sums: a strong decay would blur the weak ones
    apart = tl.trans(tl.where(above, 0.0, 1.0))
    decay = tl.dot(tl.where(above, g[None, :], 0.0), apart, input_precision=PRECISION)
    E = products * norm[:, None] * norm[None, :] * tl.exp(decay)
    inverse = _inverse(tl.where(above & (c < r), E * beta[:, None], 0.0), r, c, KEYS, PRECISION)
    decay = tl.dot(tl.where(above_query, g[None, :], 0.0), apart, input_precision=PRECISION)
    E = products_query * norm_query[:, None] * norm[None, :] * tl.exp(decay)
    E = tl.where(above_query, E, 0.0)
    outputs = tl.dot(E, inverse, input_precision=PRECISION) * beta[None, :]
    left = norm * tl.exp(tl.sum(tl.where((c > r) & (c < ROOM), g[None, :], 0.0), 1))
    solution += (sequence * HV + head).to(tl.int64) * ((R + 2) * R)
    tl.store(solution + r1, norm * tl.exp(G), mask=r1 < KEYS)
    tl.store(solution + KEYS + t1, norm_query * tl.exp(G_query), mask=t1 < P)
    tl.store(solution + R + r1, tl.exp(G_old) + r1 * 0.0, mask=r1 == 0)
    solution += 2 * R + c
    changes = inverse * left[:, None] * beta[None, :]
    tl.store(solution + r * R, changes, mask=(r < ROOM) & (c < KEYS))
    tl.store(solution + (KEYS + t1[:, None]) * R, outputs, mask=(t1[:, None] < P) & (c < KEYS))


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def _replay(
    v, state, state_indices, num_accepted, cu_seqlens, kept_k, kept_v, rows_of_X, solution,
    gate, norm_weight, out, eps, B, T, v_t, v_h, state_s, state_h, state_v, state_k,
    indices_b, accepted_b, cu_b, kept_k_s, kept_k_p, kept_k_h, kept_k_k,
    kept_v_s, kept_v_p, kept_v_h, kept_v_v, gate_t, gate_h, gate_v, weight_v, out_t, out_h, out_v,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    P: tl.constexpr, ROOM: tl.constexpr, R: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
    PAD: tl.constexpr, SILU: tl.constexpr, TERMS: tl.constexpr, UPDATE_TERMS: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr, V_START: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = V // BV
    KEYS: tl.constexpr = ROOM + P
    CHUNKS: tl.constexpr = K // BK
    part = tl.program_id(0) % PARTS
    head = tl.program_id(0) // PARTS % HV
    sequence = tl.program_id(0) // (PARTS * HV)
    key_head = head // (HV // H)
    o_v = part * BV + tl.arange(0, BV)[:, None]
    slot, pending, row, count = _place(
        state_indices, num_accepted, cu_seqlens, indices_b, accepted_b, cu_b, sequence, B, T,
        P, ROOM, PAD,
    )  # fmt: skip
    out += head * out_h + o_v * out_v
    if slot <= PAD:
        if PDL:
            tl.extra.cuda.gdc_wait()
        zeros = tl.zeros([BV, 16], out.dtype.element_ty)
        for t in range(0, count, 16):
            token = t + tl.arange(0, 16)[None, :]
            tl.store(out + (row + token) * out_t, zeros, mask=token < count)
        return

    there = slot > PAD
    count = tl.minimum(count, P)
    r1 = tl.arange(0, R)
    r = r1[:, None]
    c = r1[None, :]
    o_k = tl.arange(0, BK)[None, :]
    is_old = r1 < pending
    is_key = (r1 >= ROOM) & (r1 < ROOM + count)
    is_query = (r1 >= KEYS) & (r1 < KEYS + count)
    state += slot * state_s + head * state_h + o_v * state_v + o_k * state_k
    S = _fetch_chunks(state, BK * state_k, there, there, CHUNKS)
    kept_v += slot * kept_v_s + head * kept_v_h + o_v * kept_v_v
    old_v = _fetch(kept_v + c * kept_v_p, is_old[None, :], there)
    if PDL:
        # v is the convolution's, X and the solution are the kernel's before; nothing above was
        tl.extra.cuda.gdc_wait()
    rows_of_X += (sequence.to(tl.int64) * H + key_head) * (R * K)
    X = _fetch_chunks(rows_of_X + r * K + o_k, BK, r < KEYS + P, there, CHUNKS)
    solution += (sequence * HV + head).to(tl.int64) * ((R + 2) * R)
    decay = tl.load(solution + c, mask=c < KEYS + P, other=0.0)
    decay_left = tl.load(solution + R)
    is_solved = (r < KEYS) & ((c < ROOM) | ((c >= KEYS) & (c < KEYS + P)))
    solved = _fetch(solution + 2 * R + c * R + r, is_solved, there)
    v += row * v_t + V_START + head * v_h + o_v
    new_v = _fetch(v + (c - ROOM) * v_t, is_key[None, :], there)
    kept_k += slot * kept_k_s + key_head * kept_k_h + o_k * kept_k_k
    if (part == 0) & (head % (HV // H) == 0):
        for n in tl.static_range(CHUNKS):
            target = kept_k + (r - ROOM) * kept_k_p + n * BK * kept_k_k
            tl.store(target, X[n], mask=is_key[:, None])
    # other threads may store what a thread has yet to load
    tl.debug_barrier()
    tl.store(kept_v + (c - ROOM) * kept_v_p, new_v, mask=is_key[None, :])

    Y = tl.zeros([BV, R], tl.float32)
    for n in tl.static_range(CHUNKS):
        Y = _dot_terms(S[n].to(tl.float32), tl.trans(X[n]), Y, TERMS, PRECISION)
    Y *= decay
    values = old_v.to(tl.float32) + new_v.to(tl.float32)
    D = tl.dot(values - Y, solved, input_precision=PRECISION)
    o = Y + D
    if gate is not None:
        gate += (row + c - KEYS) * gate_t + head * gate_h + o_v * gate_v
        weight = tl.load(norm_weight + o_v * weight_v).to(tl.float32)
        z = tl.load(gate, mask=is_query[None, :], other=0.0).to(tl.float32)
        z = silu(z) if SILU else tl.sigmoid(z)
        mean = tl.sum(o * o, 0)[None, :] / V
        o = tl.where(mean > 0.0, o * tl.rsqrt(mean + eps) * weight * z, 0.0)
    out += (row + c - KEYS) * out_t
    tl.store(out, o.to(out.dtype.element_ty), mask=is_query[None, :])
    if pending > 0:
        D = tl.where(c < ROOM, D, 0.0)
        for n in tl.static_range(CHUNKS):
            updated = S[n].to(tl.float32) * decay_left
            updated = _dot_terms(D, X[n], updated, UPDATE_TERMS, PRECISION)
            tl.store(state + n * BK * state_k, updated.to(state.dtype.element_ty))


def make_replay(
    spec: GdnSpec, device: Device, *, deterministic: bool, pdl: bool, starts: tuple[int, int]
) -> Callable[..., bool]:
    """Return what launches the kernels, and says whether they applied the gate.

    Args:
        spec: the layer.
        device: where.
        deterministic: take one tile whatever the batch.
        pdl: the kernel before them wrote q, k and v and nothing else that they read, and they may
            start before it ends.
        starts: first columns of k and v in the tensors that they are passed as.
    """
    H, HV, K, V = spec.num_k_heads, spec.num_v_heads, spec.head_k_dim, spec.head_v_dim
    PAD, SILU = spec.pad_slot, spec.gate_activation == "silu"
    tiles_by_size = TILES.get(device.arch, TILES[device.kind])
    tiles = tiles_by_size[4 if spec.state_dtype is torch.float32 else 2]
    terms, update_terms = _terms(spec, device)
    precision = "tf32x3" if device.kind == "cuda" else "ieee"
    overlaps = can_overlap(device)
    plain = {"enable_fp_fusion": FP_FUSION}
    early = {**plain, "launch_pdl": True}
    solve_options = early if pdl else plain
    replay_options = early if overlaps else plain
    k_start, v_start = starts

    @functools.cache
    def fit(P: int, room: int, heads: int) -> tuple[int, int, int, Tile]:
        R = max(16, power_of_two(room + 2 * P))
        tile = _tile(tiles, 1 << 30 if deterministic else heads, K, V, R)
        return R, max(16, power_of_two(room + P)), max(16, power_of_two(P)), tile

    def launch(
        q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor,
        state: Tensor, *, metadata: VerifyMetadata, drafts: ReplayDrafts, B: int, out: Tensor,
        gate: Tensor | None, norm_weight: Tensor | None, eps: float, qkv: tuple[int, ...],
    ) -> bool:  # fmt: skip
        P, room = metadata.max_drafts, drafts.k.shape[1]
        R, RK, RQ, (rows, chunk, warps) = fit(P, room, B * HV)
        if rows < V:
            gate = None
        X = torch.empty(B * H * R * K, dtype=k.dtype, device=k.device)
        solution = torch.empty(B * HV * (R + 2) * R, dtype=torch.float32, device=k.device)
        indices, accepted, cu = metadata.state_indices, metadata.num_accepted, metadata.cu_seqlens
        batch = indices.stride(0), *strides(accepted, 1), *strides(cu, 1)
        if B:
            _solve[(B * HV,)](
                q, k, a, b, A_log, dt_bias, indices, accepted, cu, metadata.parents, drafts.k,
                drafts.g, drafts.beta, X, solution, spec.q_scale, B, v.shape[0], *qkv[:4],
                *a.stride(), *b.stride(), A_log.stride(0), dt_bias.stride(0), *batch,
                *strides(metadata.parents, 2), *drafts.k.stride(), *drafts.g.stride(),
                *drafts.beta.stride(), H, HV, K, P, room, R, RK, RQ, PAD, spec.qk_l2norm,
                precision, overlaps, pdl, k_start,
                num_warps=1 if RK == 16 and K * k.element_size() <= 256 else 4, num_stages=1,
                **solve_options,
            )  # fmt: skip
        sequences = B if cu is None else B + 1
        _replay[(sequences * HV * (V // rows),)](
            v, state, indices, accepted, cu, drafts.k, drafts.v, X, solution, gate, norm_weight,
            out, eps, B, v.shape[0], *qkv[4:], *state.stride(), *batch,
            *drafts.k.stride(), *drafts.v.stride(), *strides(gate, 3), *strides(norm_weight, 1),
            *out.stride(), H, HV, K, V, P, room, R, rows, chunk, PAD, SILU, terms,
            update_terms, precision, overlaps, v_start, num_warps=warps, num_stages=1,
            **replay_options,
        )  # fmt: skip
        return gate is not None

    return launch


def refuse_large_trees(metadata: VerifyMetadata, drafts: Drafts | None) -> None:
    """Raise where a path through a tree would not fit into the bits of an int32.

    Raises:
        InputError: replay is asked for a tree of more than 31 drafts.
    """
    if isinstance(drafts, ReplayDrafts) and metadata.is_tree and metadata.max_drafts > MOST_DRAFTS:
        raise InputError(
            f"max_drafts of a tree is {metadata.max_drafts}, needs at most {MOST_DRAFTS} for replay"
        )


def can_overlap(device: Device) -> bool:
    """Return whether a kernel may start before the one in front of it ends."""
    return device.kind == "cuda" and int(device.arch.removeprefix("sm")) >= 90


def _terms(spec: GdnSpec, device: Device) -> tuple[int, int]:
    """Return how the state and its change are multiplied with X, as ``_dot_terms`` takes it."""
    terms = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 1}[spec.state_dtype]
    has_exact_tf32 = device.kind == "cuda" and spec.dtype is not torch.float32
    if spec.dtype is torch.bfloat16:
        exact = -2 if has_exact_tf32 and terms == 3 else terms
        return exact, -2 if has_exact_tf32 else max(terms, 2)
    change = -2 if has_exact_tf32 else 0
    return (1 if spec.dtype is spec.state_dtype is torch.float16 else change), change


def _tile(tiles: tuple[tuple[float, Tile], ...], heads: int, K: int, V: int, R: int) -> Tile:
    """Return the tile for a batch: fewer rows where K is large, more warps where R is."""
    rows, chunk, warps = next(tile for limit, tile in tiles if heads <= limit)
    rows = min(max(rows * 128 // max(K, 128), 16), V)
    return Tile(rows, min(chunk, K), warps * 2 if R > 32 else warps)
