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
def _product(x, y, plus, LOW: tl.constexpr, PRECISION: tl.constexpr):
    """Return x y + plus, the operands rounded to float16 where LOW."""
    if LOW:
        x = x.to(tl.float16)
        y = y.to(tl.float16)
    return tl.dot(x, y, plus, input_precision=PRECISION)


@triton.jit
def _double(R, X, row, column, ROWS: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr):
    """Return the inverse in blocks of 2 * ROWS rows, given that in blocks of ROWS."""
    joins = (row // (2 * ROWS) == column // (2 * ROWS)) & (row // ROWS > column // ROWS)
    low = tl.where(joins, X, 0.0)
    return _product(_product(R, low, None, LOW, PRECISION), R, R, LOW, PRECISION)


@triton.jit
def _invert_block(X, LOW: tl.constexpr, PRECISION: tl.constexpr):
    """Return the inverse of I - X for X [16, 16], of which what is below the diagonal counts."""
    row = tl.arange(0, 16)[:, None]
    column = tl.arange(0, 16)[None, :]
    R = tl.where((row // 2 == column // 2) & (row > column), X, 0.0).to(tl.float32)
    R = tl.where(row == column, 1.0, R)
    R = _double(R, X, row, column, 2, LOW, PRECISION)
    R = _double(R, X, row, column, 4, LOW, PRECISION)
    return _double(R, X, row, column, 8, LOW, PRECISION)


@triton.jit
def _apart(G_i, G_j, low_i, low_j, WIDE: tl.constexpr):
    """Return G_i - G_j, at most 0; where sums are WIDE without their rounding."""
    apart = G_i - G_j
    if WIDE:
        apart += low_i - low_j
    return tl.minimum(apart, 0.0)


@triton.jit
def _sums(g, before, before_low, WIDE: tl.constexpr):
    """Return running sums of g [16] in log2 on top of those before it, each as two terms.

    One strong decay would blur the weak ones beside it: where WIDE, sums of sixteenths are exact
    and the rest of each decay is too small to lose anything. Else the second term is 0.
    """
    g = tl.maximum(g, STRONGEST) * LOG2_E
    low = tl.zeros_like(g)
    if WIDE:
        coarse = tl.floor(g * 16.0 + 0.5) * 0.0625
        low = tl.cumsum(g - coarse, 0) + before_low
        g = coarse
    return tl.cumsum(g, 0) + before, low


@triton.jit
def _last(x):
    """Return the last of x [16]."""
    return tl.sum(tl.where(tl.arange(0, 16) == 15, x, 0.0))


@triton.jit
def _load_rows(x, stride, left, ROW: tl.constexpr):
    """Return x [16] from ROW on, 0 past the end."""
    r = ROW + tl.arange(0, 16)
    return tl.load(x + r * stride, mask=r < left, other=0.0)


@triton.jit
def _load_block(x, ROW: tl.constexpr, COLUMN: tl.constexpr):
    """Return block (ROW, COLUMN) [16, 16] of a chunk's x [64, 64]."""
    r = tl.arange(0, 16)
    at = (ROW * 16 + r)[:, None] * CHUNK + (COLUMN * 16 + r)[None, :]
    return tl.load(x + at)


@triton.jit
def _overlap(keys, beta, LOW: tl.constexpr):
    """Return a block of -beta k k^T, in float16 where LOW: the inverse is that of what is kept."""
    X = keys.to(tl.float32) * -beta[:, None]
    if LOW:
        X = X.to(tl.float16)
    return X


@triton.jit
def _store_block(x, block, ROW: tl.constexpr, COLUMN: tl.constexpr):
    """Store block (ROW, COLUMN) [16, 16] of a chunk's x [64, 64]."""
    r = tl.arange(0, 16)
    at = (ROW * 16 + r)[:, None] * CHUNK + (COLUMN * 16 + r)[None, :]
    tl.store(x + at, block.to(x.dtype.element_ty))


@triton.jit
def _decays(G, low, WIDE: tl.constexpr):
    """Return the decays between the tokens of a block."""
    r = tl.arange(0, 16)
    decays = tl.exp2(_apart(G[:, None], G[None, :], low[:, None], low[None, :], WIDE))
    return tl.where(r[:, None] >= r[None, :], decays, 0.0)


@triton.jit
def _store_decayed(
    x, block, G_row, G_column, low_row, low_column, factor,
    ROW: tl.constexpr, COLUMN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store a block below the diagonal: its decays are those since and to its columns' end."""
    end, end_low = _last(G_column), _last(low_column)
    rows = tl.exp2(_apart(G_row, end, low_row, end_low, WIDE))
    columns = tl.exp2(_apart(end, G_column, end_low, low_column, WIDE)) * factor
    _store_block(x, block.to(tl.float32) * rows[:, None] * columns[None, :], ROW, COLUMN)


@triton.jit
def _store_factors(
    factors, decay_low, norms, G, low, total, total_low, ROW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store the factors of 16 rows."""
    r = ROW * 16 + tl.arange(0, 16)
    n_q = tl.load(norms + r)
    n_k = tl.load(norms + CHUNK + r)
    # the sum is rounded here, and only what is lost by it is kept
    rounded = G + low if WIDE else G
    if WIDE:
        tl.store(decay_low + r, (G - rounded) + low)
    tl.store(factors + r, rounded)
    tl.store(factors + CHUNK + r, tl.exp2(rounded) * -n_k)
    tl.store(factors + 2 * CHUNK + r, tl.exp2(rounded) * n_q)
    after = tl.exp2(_apart(total, G, total_low, low, WIDE))
    tl.store(factors + 3 * CHUNK + r, after * n_k)


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def compare(
    q, k, queries, keys, norms, cu_seqlens, state_indices, N, T, scale, cu_s, state_indices_s,
    q_t: tl.constexpr, q_h: tl.constexpr, q_k: tl.constexpr,
    k_t: tl.constexpr, k_h: tl.constexpr, k_k: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, L2NORM: tl.constexpr,
    PAD: tl.constexpr, OVERLAPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fill queries, q k^T, and keys, k k^T [., H, 64, 64], and norms [., H, 2, 64] of each chunk.

    A program owns a chunk of one q/k head. Products are normalised and scaled, and 0 above the
    diagonal; blocks of 16 x 16 above it are not written. Norms are what q and k are multiplied by.
    """
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    k_head = program % H
    sequence, _, end, first = locate(cu_seqlens, cu_s, N, T, program // H, CHUNK)
    if (sequence == N) | (first >= end):
        return
    if tl.load(state_indices + sequence * state_indices_s) <= PAD:
        return
    base = first.to(tl.int64)
    r = tl.arange(0, CHUNK)
    inside = r < end - first
    seen = tl.zeros([CHUNK, CHUNK], tl.float32)
    alike = tl.zeros([CHUNK, CHUNK], tl.float32)
    own = tl.zeros([CHUNK, CHUNK], tl.float32)
    for start_k in tl.static_range(0, K, BK):
        o_k = (start_k + tl.arange(0, BK))[None, :]
        at = q + base * q_t + k_head * q_h + r[:, None] * q_t + o_k * q_k
        qt = tl.load(at, mask=inside[:, None], other=0.0)
        at = k + base * k_t + k_head * k_h + r[:, None] * k_t + o_k * k_k
        kt = tl.load(at, mask=inside[:, None], other=0.0)
        seen = tl.dot(qt, tl.trans(kt), seen, input_precision=PRECISION)
        alike = tl.dot(kt, tl.trans(kt), alike, input_precision=PRECISION)
        if L2NORM:
            own = tl.dot(qt, tl.trans(qt), own, input_precision=PRECISION)
    n_q = tl.full([CHUNK], 1.0, tl.float32) * scale
    n_k = tl.full([CHUNK], 1.0, tl.float32)
    if L2NORM:
        diagonal = r[:, None] == r[None, :]
        n_q = tl.rsqrt(tl.sum(tl.where(diagonal, own, 0.0), 1) + 1e-6) * scale
        n_k = tl.rsqrt(tl.sum(tl.where(diagonal, alike, 0.0), 1) + 1e-6)
    at = norms + program.to(tl.int64) * (2 * CHUNK) + r
    tl.store(at, n_q)
    tl.store(at + CHUNK, n_k)
    seen = seen * n_q[:, None] * n_k[None, :]
    alike = alike * n_k[:, None] * n_k[None, :]
    written = r[:, None] // 16 >= r[None, :] // 16
    tile = program.to(tl.int64) * (CHUNK * CHUNK) + r[:, None] * CHUNK + r[None, :]
    tl.store(queries + tile, seen.to(queries.dtype.element_ty), mask=written)
    tl.store(keys + tile, alike.to(keys.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def prepare(
    g, beta, queries, keys, norms, attention, inverse, factors, decay_low,
    cu_seqlens, state_indices, N, T, g_t, g_h, beta_t, beta_h, cu_s, state_indices_s,
    H: tl.constexpr, HV: tl.constexpr, PAD: tl.constexpr, LOW: tl.constexpr,
    OVERLAPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fill attention and inverse [., HV, 64, 64] and factors [., HV, 4, 64] of every chunk.

    A program owns a chunk of one value head, in ten blocks of 16 x 16; those above the diagonal
    are not written. Token i of a chunk sees token j with weight e^(G_i - G_j) q_i k_j. Factors are
    the decay G in log2, and ``read``, ``reach`` and ``write``: the state before the chunk is read
    with ``read`` k, negative because it is taken off v, and with ``reach`` q; the one after it gets
    ``write`` k. They hold decays, norms and scale. Past a sequence's end attention and inverse are 0 and factors are finite.
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
    left = end - first
    g += first.to(tl.int64) * g_t + head * g_h
    beta += first.to(tl.int64) * beta_t + head * beta_h
    WIDE: tl.constexpr = decay_low is not None
    G0, low0 = _sums(_load_rows(g, g_t, left, 0), 0.0, 0.0, WIDE)
    G1, low1 = _sums(_load_rows(g, g_t, left, 16), _last(G0), _last(low0), WIDE)
    G2, low2 = _sums(_load_rows(g, g_t, left, 32), _last(G1), _last(low1), WIDE)
    G3, low3 = _sums(_load_rows(g, g_t, left, 48), _last(G2), _last(low2), WIDE)
    b0 = _load_rows(beta, beta_t, left, 0)
    b1 = _load_rows(beta, beta_t, left, 16)
    b2 = _load_rows(beta, beta_t, left, 32)
    b3 = _load_rows(beta, beta_t, left, 48)
    if OVERLAPS:
        # nothing is stored before this and no program ends without it
        tl.extra.cuda.gdc_wait()
    tile = place.to(tl.int64) * H + head // (HV // H)
    queries += tile * (CHUNK * CHUNK)
    keys += tile * (CHUNK * CHUNK)
    norms += tile * (2 * CHUNK)
    attention += program.to(tl.int64) * (CHUNK * CHUNK)
    inverse += program.to(tl.int64) * (CHUNK * CHUNK)
    factors += program.to(tl.int64) * (4 * CHUNK)
    if WIDE:
        decay_low += program.to(tl.int64) * CHUNK
    # all at once: a warp has nothing else to do while it waits
    k00 = _load_block(keys, 0, 0)
    k10 = _load_block(keys, 1, 0)
    k11 = _load_block(keys, 1, 1)
    k20 = _load_block(keys, 2, 0)
    k21 = _load_block(keys, 2, 1)
    k22 = _load_block(keys, 2, 2)
    k30 = _load_block(keys, 3, 0)
    k31 = _load_block(keys, 3, 1)
    k32 = _load_block(keys, 3, 2)
    k33 = _load_block(keys, 3, 3)
    q00 = _load_block(queries, 0, 0)
    q10 = _load_block(queries, 1, 0)
    q11 = _load_block(queries, 1, 1)
    q20 = _load_block(queries, 2, 0)
    q21 = _load_block(queries, 2, 1)
    q22 = _load_block(queries, 2, 2)
    q30 = _load_block(queries, 3, 0)
    q31 = _load_block(queries, 3, 1)
    q32 = _load_block(queries, 3, 2)
    q33 = _load_block(queries, 3, 3)
    total = _last(G3)
    total_low = _last(low3)
    _store_factors(factors, decay_low, norms, G0, low0, total, total_low, 0, WIDE)
    _store_factors(factors, decay_low, norms, G1, low1, total, total_low, 1, WIDE)
    _store_factors(factors, decay_low, norms, G2, low2, total, total_low, 2, WIDE)
    _store_factors(factors, decay_low, norms, G3, low3, total, total_low, 3, WIDE)

    _store_block(attention, q00.to(tl.float32) * _decays(G0, low0, WIDE), 0, 0)
    _store_block(attention, q11.to(tl.float32) * _decays(G1, low1, WIDE), 1, 1)
    _store_block(attention, q22.to(tl.float32) * _decays(G2, low2, WIDE), 2, 2)
    _store_block(attention, q33.to(tl.float32) * _decays(G3, low3, WIDE), 3, 3)
    _store_decayed(attention, q10, G1, G0, low1, low0, 1.0, 1, 0, WIDE)
    _store_decayed(attention, q20, G2, G0, low2, low0, 1.0, 2, 0, WIDE)
    _store_decayed(attention, q21, G2, G1, low2, low1, 1.0, 2, 1, WIDE)
    _store_decayed(attention, q30, G3, G0, low3, low0, 1.0, 3, 0, WIDE)
    _store_decayed(attention, q31, G3, G1, low3, low1, 1.0, 3, 1, WIDE)
    _store_decayed(attention, q32, G3, G2, low3, low2, 1.0, 3, 2, WIDE)

    r0 = _invert_block(_overlap(k00, b0, LOW), LOW, PRECISION)
    r1 = _invert_block(_overlap(k11, b1, LOW), LOW, PRECISION)
    r2 = _invert_block(_overlap(k22, b2, LOW), LOW, PRECISION)
    r3 = _invert_block(_overlap(k33, b3, LOW), LOW, PRECISION)
    _store_block(inverse, r0 * _decays(G0, low0, WIDE) * b0[None, :], 0, 0)
    _store_block(inverse, r1 * _decays(G1, low1, WIDE) * b1[None, :], 1, 1)
    _store_block(inverse, r2 * _decays(G2, low2, WIDE) * b2[None, :], 2, 2)
    _store_block(inverse, r3 * _decays(G3, low3, WIDE) * b3[None, :], 3, 3)
    # two inverted halves make the inverse of the whole: R_low X R_high stands below the diagonal
    r10 = _product(r1, _overlap(k10, b1, LOW), None, LOW, PRECISION)
    r10 = _product(r10, r0, None, LOW, PRECISION)
    _store_decayed(inverse, r10, G1, G0, low1, low0, b0, 1, 0, WIDE)
    r32 = _product(r3, _overlap(k32, b3, LOW), None, LOW, PRECISION)
    r32 = _product(r32, r2, None, LOW, PRECISION)
    _store_decayed(inverse, r32, G3, G2, low3, low2, b2, 3, 2, WIDE)
    x20 = _overlap(k20, b2, LOW)
    x21 = _overlap(k21, b2, LOW)
    y20 = _product(r2, x20, None, LOW, PRECISION)
    y21 = _product(r2, x21, None, LOW, PRECISION)
    y30 = _product(r3, _overlap(k30, b3, LOW), None, LOW, PRECISION)
    y30 = _product(r32, x20, y30, LOW, PRECISION)
    y31 = _product(r3, _overlap(k31, b3, LOW), None, LOW, PRECISION)
    y31 = _product(r32, x21, y31, LOW, PRECISION)
    r20 = _product(y21, r10, _product(y20, r0, None, LOW, PRECISION), LOW, PRECISION)
    r30 = _product(y31, r10, _product(y30, r0, None, LOW, PRECISION), LOW, PRECISION)
    r21 = _product(y21, r1, None, LOW, PRECISION)
    r31 = _product(y31, r1, None, LOW, PRECISION)
    _store_decayed(inverse, r20, G2, G0, low2, low0, b0, 2, 0, WIDE)
    _store_decayed(inverse, r30, G3, G0, low3, low0, b0, 3, 0, WIDE)
    _store_decayed(inverse, r21, G2, G1, low2, low1, b1, 2, 1, WIDE)
    _store_decayed(inverse, r31, G3, G1, low3, low1, b1, 3, 1, WIDE)
