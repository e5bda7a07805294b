# SPDX-License-Identifier: Apache-2.0
"""What the chunks of a prefill need before any state is known.

``attend`` finds decays, norms and how far each token sees the ones before it; ``invert`` solves
for the updates.

In a chunk of C = 64 tokens with cumulative log decay G, the updates u of a state S solve

    u_i + sum over j < i of beta_i (k_i k_j) e^(G_i - G_j) u_j = beta_i (v_i - e^G_i S k_i)

so u = inverse (v - e^G S k) with inverse_ij = e^(G_i - G_j) R_ij beta_j, where R is the inverse of
the unit lower triangular I + beta k k^T. The decay stands outside of R, which is bounded by beta
for unit keys: R is found by exact doubling, blocks of 1, 2, 4, ... 64 rows, on tensor cores. No
series is cut short, so repeated keys with beta near 1 are safe.
"""

import triton
import triton.language as tl

from gdn_backend_triton.launch import STEP_SIZES, STEP_TENSORS
from gdn_backend_triton.maths import LOG2_E
from gdn_backend_triton.sequences import locate

CHUNK = tl.constexpr(64)
# nats a single token may decay by: its state is gone to 4e-18, and sums over a chunk stay exact
# enough for the weak decays beside it
STRONGEST = tl.constexpr(-40.0)


@triton.jit
def _product(x, y, LOW: tl.constexpr, PRECISION: tl.constexpr):
    """Return x y, the operands rounded to float16 where LOW."""
    if LOW:
        return tl.dot(x.to(tl.float16), y.to(tl.float16))
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def _double(R, X, row, column, ROWS: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr):
    """Return the inverse in blocks of 2 * ROWS rows, given that in blocks of ROWS."""
    joins = (row // (2 * ROWS) == column // (2 * ROWS)) & (row // ROWS != column // ROWS)
    low = tl.where(joins, X, 0.0)
    return R - _product(_product(R, low, LOW, PRECISION), R, LOW, PRECISION)


@triton.jit
def _invert_block(X, LOW: tl.constexpr, PRECISION: tl.constexpr):
    """Return the inverse of I + X for a strictly lower X [16, 16]."""
    row = tl.arange(0, 16)[:, None]
    column = tl.arange(0, 16)[None, :]
    X = tl.where(row > column, X, 0.0)
    R = tl.where(row == column, 1.0, 0.0) - tl.where(row // 2 == column // 2, X, 0.0)
    R = _double(R, X, row, column, 2, LOW, PRECISION)
    R = _double(R, X, row, column, 4, LOW, PRECISION)
    return _double(R, X, row, column, 8, LOW, PRECISION)


@triton.jit
def _overlap(X, row_factor, column_factor, LOW: tl.constexpr):
    """Return row_i column_j X_ij, in float16 where LOW: the inverse is that of what is kept."""
    X = X * row_factor[:, None] * column_factor[None, :]
    return X.to(tl.float16).to(tl.float32) if LOW else X


@triton.jit
def _apart(G_i, G_j, low_i, low_j, WIDE: tl.constexpr):
    """Return G_i - G_j, at most 0; where sums are WIDE without their rounding."""
    apart = G_i - G_j
    if WIDE:
        apart += low_i - low_j
    return tl.minimum(apart, 0.0)


@triton.jit
def _sums(g, WIDE: tl.constexpr):
    """Return running sums in log2, and what rounding took from each where WIDE.

    One strong decay would blur the weak ones beside it: sums of sixteenths are exact, the rest of
    each decay is too small to lose anything.
    """
    g = tl.maximum(g, STRONGEST) * LOG2_E
    G = tl.cumsum(g, 0)
    low = tl.zeros_like(G)
    if WIDE:
        coarse = tl.floor(g * 16.0 + 0.5) * 0.0625
        high = tl.cumsum(coarse, 0)
        rest = tl.cumsum(g - coarse, 0)
        G = high + rest
        low = (high - G) + rest
    return G, low


@triton.jit
def _store_block(
    inverse, R, row, G_row, G_column, low_row, low_column, beta,
    COLUMN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store block COLUMN of 16 rows of the inverse, decayed and times beta."""
    column = COLUMN * 16 + tl.arange(0, 16)
    apart = _apart(G_row[:, None], G_column[None, :], low_row[:, None], low_column[None, :], WIDE)
    decay = tl.exp2(apart)
    values = R * decay * beta[None, :]
    at = inverse + row[:, None] + column[None, :]
    tl.store(at, values.to(inverse.dtype.element_ty))


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def attend(
    q, k, g, attention, factors, decay_low, k_factor, cu_seqlens, state_indices, N, T, scale,
    g_t, g_h, cu_s, state_indices_s, q_t: tl.constexpr, q_h: tl.constexpr, q_k: tl.constexpr,
    k_t: tl.constexpr, k_h: tl.constexpr, k_k: tl.constexpr,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, L2NORM: tl.constexpr,
    PAD: tl.constexpr, OVERLAPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fill attention [., HV, 64, 64] and factors [., HV, 4, 64] of every chunk.

    A program owns a chunk of one q/k head. Token i of a chunk sees token j with weight
    e^(G_i - G_j) q_i k_j; blocks of 16 x 16 above the diagonal are not written. Factors are the
    decay G in log2, and ``read``, ``reach`` and ``write``: the state before the chunk is read with
    ``read`` k and with ``reach`` q, the one after it gets ``write`` k. They hold decays, norms and
    scale. k_factor [., H, 64] is k's inverse norm, where L2NORM. Rows past a sequence's end have
    attention 0 and factors that are finite.
    """
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    k_head = program % H
    place = program // H
    sequence, _, end, first = locate(cu_seqlens, cu_s, N, T, place, CHUNK)
    if (sequence == N) | (first >= end):
        return
    if tl.load(state_indices + sequence * state_indices_s) <= PAD:
        return
    base = first.to(tl.int64)
    r = tl.arange(0, CHUNK)
    inside = r < end - first
    overlap = tl.zeros([CHUNK, CHUNK], tl.float32)
    q_squares = tl.zeros([CHUNK], tl.float32)
    k_squares = tl.zeros([CHUNK], tl.float32)
    for start_k in tl.static_range(0, K, BK):
        o_k = (start_k + tl.arange(0, BK))[None, :]
        at = q + base * q_t + k_head * q_h + r[:, None] * q_t + o_k * q_k
        qt = tl.load(at, mask=inside[:, None], other=0.0)
        at = k + base * k_t + k_head * k_h + r[:, None] * k_t + o_k * k_k
        kt = tl.load(at, mask=inside[:, None], other=0.0)
        overlap = tl.dot(qt, tl.trans(kt), overlap, input_precision=PRECISION)
        if L2NORM:
            q_wide = qt.to(tl.float32)
            k_wide = kt.to(tl.float32)
            q_squares += tl.sum(q_wide * q_wide, 1)
            k_squares += tl.sum(k_wide * k_wide, 1)
    n_q = tl.full([CHUNK], 1.0, tl.float32) * scale
    n_k = tl.full([CHUNK], 1.0, tl.float32)
    if L2NORM:
        n_q = tl.rsqrt(q_squares + 1e-6) * scale
        n_k = tl.rsqrt(k_squares + 1e-6)
        tl.store(k_factor + program.to(tl.int64) * CHUNK + r, n_k)
    overlap = overlap * n_q[:, None] * n_k[None, :]
    overlap = tl.where(r[:, None] >= r[None, :], overlap, 0.0)
    below = r[:, None] // 16 >= r[None, :] // 16
    WIDE: tl.constexpr = decay_low is not None
    RATIO: tl.constexpr = HV // H
    for i in range(RATIO):
        head = k_head * RATIO + i
        gt = tl.load(g + base * g_t + head * g_h + r * g_t, mask=inside, other=0.0)
        G, low = _sums(gt, WIDE)
        total = tl.sum(tl.where(r == CHUNK - 1, G, 0.0))
        total_low = tl.sum(tl.where(r == CHUNK - 1, low, 0.0))
        chunk = place.to(tl.int64) * HV + head
        if WIDE:
            tl.store(decay_low + chunk * CHUNK + r, low)
        own = factors + chunk * (4 * CHUNK) + r
        tl.store(own, G)
        tl.store(own + CHUNK, tl.exp2(G) * n_k)
        tl.store(own + 2 * CHUNK, tl.exp2(G) * n_q)
        tl.store(own + 3 * CHUNK, tl.exp2(_apart(total, G, total_low, low, WIDE)) * n_k)
        apart = _apart(G[:, None], G[None, :], low[:, None], low[None, :], WIDE)
        seen = overlap * tl.exp2(apart)
        rows = attention + chunk * (CHUNK * CHUNK) + r[:, None] * CHUNK
        tl.store(rows + r[None, :], seen.to(attention.dtype.element_ty), mask=below)


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def invert(
    k, beta, inverse, factors, decay_low, k_factor, cu_seqlens, state_indices, N, T,
    beta_t, beta_h, cu_s, state_indices_s,
    k_t: tl.constexpr, k_h: tl.constexpr, k_k: tl.constexpr,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, L2NORM: tl.constexpr,
    PAD: tl.constexpr, LOW: tl.constexpr, OVERLAPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fill inverse [., HV, 64, 64]; blocks of 16 x 16 above the diagonal are not written.

    A program owns a chunk of one value head, in ten such blocks. Rows and columns past a
    sequence's end are 0.
    """
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    head = program % HV
    place = program // HV
    sequence, _, end, first = locate(cu_seqlens, cu_s, N, T, place, CHUNK)
    idle = (sequence == N) | (first >= end)
    if not idle:
        idle = tl.load(state_indices + sequence * state_indices_s) <= PAD
    if idle:
        if OVERLAPS:
            tl.extra.cuda.gdc_wait()
        return
    k_head = head // (HV // H)
    base = first.to(tl.int64)
    left = end - first
    r = tl.arange(0, 16)
    in0 = r < left
    in1 = r + 16 < left
    in2 = r + 32 < left
    in3 = r + 48 < left

    a00 = tl.zeros([16, 16], tl.float32)
    a10 = a00
    a11 = a00
    a20 = a00
    a21 = a00
    a22 = a00
    a30 = a00
    a31 = a00
    a32 = a00
    a33 = a00
    rows = k + base * k_t + k_head * k_h + r[:, None] * k_t
    for start_k in tl.static_range(0, K, BK):
        at = rows + (start_k + tl.arange(0, BK))[None, :] * k_k
        k0 = tl.load(at, mask=in0[:, None], other=0.0)
        k1 = tl.load(at + 16 * k_t, mask=in1[:, None], other=0.0)
        k2 = tl.load(at + 32 * k_t, mask=in2[:, None], other=0.0)
        k3 = tl.load(at + 48 * k_t, mask=in3[:, None], other=0.0)
        a00 = tl.dot(k0, tl.trans(k0), a00, input_precision=PRECISION)
        a10 = tl.dot(k1, tl.trans(k0), a10, input_precision=PRECISION)
        a20 = tl.dot(k2, tl.trans(k0), a20, input_precision=PRECISION)
        a30 = tl.dot(k3, tl.trans(k0), a30, input_precision=PRECISION)
        a11 = tl.dot(k1, tl.trans(k1), a11, input_precision=PRECISION)
        a21 = tl.dot(k2, tl.trans(k1), a21, input_precision=PRECISION)
        a31 = tl.dot(k3, tl.trans(k1), a31, input_precision=PRECISION)
        a22 = tl.dot(k2, tl.trans(k2), a22, input_precision=PRECISION)
        a32 = tl.dot(k3, tl.trans(k2), a32, input_precision=PRECISION)
        a33 = tl.dot(k3, tl.trans(k3), a33, input_precision=PRECISION)

    if OVERLAPS:
        # nothing is stored before this and no program ends without it
        tl.extra.cuda.gdc_wait()
    at = factors + program.to(tl.int64) * (4 * CHUNK) + r
    g0 = tl.load(at)
    g1 = tl.load(at + 16)
    g2 = tl.load(at + 32)
    g3 = tl.load(at + 48)
    WIDE: tl.constexpr = decay_low is not None
    low0, low1, low2, low3 = g0, g1, g2, g3
    if WIDE:
        at = decay_low + program.to(tl.int64) * CHUNK + r
        low0 = tl.load(at)
        low1 = tl.load(at + 16)
        low2 = tl.load(at + 32)
        low3 = tl.load(at + 48)
    at = beta + base * beta_t + head * beta_h + r * beta_t
    b0 = tl.load(at, mask=in0, other=0.0)
    b1 = tl.load(at + 16 * beta_t, mask=in1, other=0.0)
    b2 = tl.load(at + 32 * beta_t, mask=in2, other=0.0)
    b3 = tl.load(at + 48 * beta_t, mask=in3, other=0.0)

    n0 = tl.full([16], 1.0, tl.float32)
    n1 = n0
    n2 = n0
    n3 = n0
    if L2NORM:
        at = k_factor + (place.to(tl.int64) * H + k_head) * CHUNK + r
        n0 = tl.load(at)
        n1 = tl.load(at + 16)
        n2 = tl.load(at + 32)
        n3 = tl.load(at + 48)

    r0 = _invert_block(_overlap(a00, b0 * n0, n0, LOW), LOW, PRECISION)
    r1 = _invert_block(_overlap(a11, b1 * n1, n1, LOW), LOW, PRECISION)
    r2 = _invert_block(_overlap(a22, b2 * n2, n2, LOW), LOW, PRECISION)
    r3 = _invert_block(_overlap(a33, b3 * n3, n3, LOW), LOW, PRECISION)
    # two inverted halves make the inverse of the whole: -R_low X R_high stands below the diagonal
    x10 = _overlap(a10, b1 * n1, n0, LOW)
    x32 = _overlap(a32, b3 * n3, n2, LOW)
    r10 = -_product(_product(r1, x10, LOW, PRECISION), r0, LOW, PRECISION)
    r32 = -_product(_product(r3, x32, LOW, PRECISION), r2, LOW, PRECISION)
    x20 = _overlap(a20, b2 * n2, n0, LOW)
    x21 = _overlap(a21, b2 * n2, n1, LOW)
    x30 = _overlap(a30, b3 * n3, n0, LOW)
    x31 = _overlap(a31, b3 * n3, n1, LOW)
    y20 = _product(r2, x20, LOW, PRECISION)
    y21 = _product(r2, x21, LOW, PRECISION)
    y30 = _product(r3, x30, LOW, PRECISION) + _product(r32, x20, LOW, PRECISION)
    y31 = _product(r3, x31, LOW, PRECISION) + _product(r32, x21, LOW, PRECISION)
    r20 = -_product(y20, r0, LOW, PRECISION) - _product(y21, r10, LOW, PRECISION)
    r30 = -_product(y30, r0, LOW, PRECISION) - _product(y31, r10, LOW, PRECISION)
    r21 = -_product(y21, r1, LOW, PRECISION)
    r31 = -_product(y31, r1, LOW, PRECISION)

    inverse += program.to(tl.int64) * (CHUNK * CHUNK)
    row0 = r * CHUNK
    row1 = row0 + 16 * CHUNK
    row2 = row0 + 32 * CHUNK
    row3 = row0 + 48 * CHUNK
    _store_block(inverse, r0, row0, g0, g0, low0, low0, b0, 0, WIDE)
    _store_block(inverse, r10, row1, g1, g0, low1, low0, b0, 0, WIDE)
    _store_block(inverse, r1, row1, g1, g1, low1, low1, b1, 1, WIDE)
    _store_block(inverse, r20, row2, g2, g0, low2, low0, b0, 0, WIDE)
    _store_block(inverse, r21, row2, g2, g1, low2, low1, b1, 1, WIDE)
    _store_block(inverse, r2, row2, g2, g2, low2, low2, b2, 2, WIDE)
    _store_block(inverse, r30, row3, g3, g0, low3, low0, b0, 0, WIDE)
    _store_block(inverse, r31, row3, g3, g1, low3, low1, b1, 1, WIDE)
    _store_block(inverse, r32, row3, g3, g2, low3, low2, b2, 2, WIDE)
    _store_block(inverse, r3, row3, g3, g3, low3, low3, b3, 3, WIDE)
