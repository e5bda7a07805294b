# SPDX-License-Identifier: Apache-2.0
"""What the chunks of a prefill need before any state is known.

``attend`` finds decays, norms, how far each token sees the ones before it, and how alike the keys
are; ``invert`` solves for the updates.

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
from gdn_backend_triton.maths import LOG2_E, rounded
from gdn_backend_triton.overlap import begin
from gdn_backend_triton.sequences import locate

CHUNK = tl.constexpr(64)
# nats a single token may decay by: its state is gone to 4e-18, and sums over a chunk stay exact
# enough for the weak decays beside it
STRONGEST = tl.constexpr(-40.0)
# log2 of the most that a chunk leaves of a state: this where a beta |k|^2 may lie outside [0, 2],
# so that I - beta k k^T makes states longer; else what decay leaves
UNBOUNDED = tl.constexpr(1e30)


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
def _block(ROW: tl.constexpr, COLUMN: tl.constexpr):
    """Return the offsets of block (ROW, COLUMN) [16, 16] in a chunk's [64, 64]."""
    r = tl.arange(0, 16)
    return (ROW * 16 + r)[:, None] * CHUNK + (COLUMN * 16 + r)[None, :]


@triton.jit
def _load_halves(x, left):
    """Return the blocks of a chunk's x [64, 64] on and below the diagonal of its two halves.

    In a branch, always taken, all are asked for before the first is waited for.
    """
    x00 = tl.zeros([16, 16], x.dtype.element_ty)
    x10 = x00
    x11 = x00
    x22 = x00
    x32 = x00
    x33 = x00
    if left > 0:
        x00 = tl.load(x + _block(0, 0))
        x11 = tl.load(x + _block(1, 1))
        x22 = tl.load(x + _block(2, 2))
        x33 = tl.load(x + _block(3, 3))
        x10 = tl.load(x + _block(1, 0))
        x32 = tl.load(x + _block(3, 2))
    return x00, x10, x11, x22, x32, x33


@triton.jit
def _load_join(x, left):
    """Return the blocks of a chunk's x [64, 64] that join its halves; see ``_load_halves``."""
    x20 = tl.zeros([16, 16], x.dtype.element_ty)
    x21 = x20
    x30 = x20
    x31 = x20
    if left > 0:
        x20 = tl.load(x + _block(2, 0))
        x21 = tl.load(x + _block(2, 1))
        x30 = tl.load(x + _block(3, 0))
        x31 = tl.load(x + _block(3, 1))
    return x20, x21, x30, x31


@triton.jit
def _overlap(keys, beta, LOW: tl.constexpr):
    """Return a block of -beta k k^T, in float16 where LOW: the inverse is that of what is kept."""
    X = keys.to(tl.float32) * -beta[:, None]
    if LOW:
        X = X.to(tl.float16)
    return X


@triton.jit
def _load_vectors(x, stride, left):
    """Return x [64] in four, 0 past the end."""
    r = tl.arange(0, 16)
    x0 = tl.load(x + r * stride, mask=r < left, other=0.0)
    x1 = tl.load(x + (r + 16) * stride, mask=r + 16 < left, other=0.0)
    x2 = tl.load(x + (r + 32) * stride, mask=r + 32 < left, other=0.0)
    x3 = tl.load(x + (r + 48) * stride, mask=r + 48 < left, other=0.0)
    return x0, x1, x2, x3


@triton.jit
def _store_decayed(
    inverse, R, factors, decay_low, G, low, beta, ROW: tl.constexpr, COLUMN: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Store a block of the inverse: R times its decays and beta."""
    if ROW == COLUMN:
        apart = _apart(G[ROW][:, None], G[ROW][None, :], low[ROW][:, None], low[ROW][None, :], WIDE)
        R *= tl.exp2(apart)
    else:
        # fewer exponentials: since the end of the columns, and up to it
        end = tl.load(factors + (COLUMN * 16 + 15))
        low_end = 0.0
        if WIDE:
            low_end = tl.load(decay_low + (COLUMN * 16 + 15))
        R *= tl.exp2(_apart(G[ROW], end, low[ROW], low_end, WIDE))[:, None]
        beta *= tl.exp2(_apart(end, G[COLUMN], low_end, low[COLUMN], WIDE))
    R *= beta[None, :]
    tl.store(inverse + _block(ROW, COLUMN), rounded(R, inverse.dtype.element_ty))


@triton.jit
def head_offset(head, stride: tl.constexpr, HEADS: tl.constexpr):
    """Return head * stride: in 64 bits, which take registers, where heads lie so far apart."""
    return (head.to(tl.int64) if stride * HEADS >= 2**31 else head) * stride


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def attend(
    q, k, g, beta, attention, keys, factors, decay_low, k_factor, bounds, cu_seqlens, state_indices,
    N, T, scale, g_t, g_h, beta_t, beta_h, cu_s, state_indices_s,
    q_t: tl.constexpr, q_h: tl.constexpr, q_k: tl.constexpr,
    k_t: tl.constexpr, k_h: tl.constexpr, k_k: tl.constexpr,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, PART: tl.constexpr,
    L2NORM: tl.constexpr, PAD: tl.constexpr, PRECISION: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Fill attention [., HV, 64, 64], keys [., H, 64, 64] and factors [., HV, 4, 64] of chunks.

    A program owns a chunk of one q/k head. Token i of a chunk sees token j with weight
    e^(G_i - G_j) q_i k_j; keys is k k^T of normalised keys. Blocks of 16 x 16 above the diagonal
    are not written. Factors are the decay G in log2, and ``read``, ``reach`` and ``write``: the
    state before the chunk is read with ``read`` k, negative because it is taken off v, and with
    ``reach`` q; the one after it gets ``write`` k. They hold decays, norms and scale. k_factor
    [., H, 64] is k's inverse norm, where L2NORM. Bounds [., HV], where given, are log2 of the most
    that a chunk leaves of a state. Rows past a sequence's end have attention 0 and factors that are
    finite.
    """
    begin(OVERLAPS)
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
    seen = tl.zeros([CHUNK, CHUNK], tl.float32)
    alike = tl.zeros([CHUNK, CHUNK], tl.float32)
    own = tl.zeros([CHUNK, CHUNK], tl.float32)
    for start_k in tl.static_range(0, K, BK):
        # a loop where there are several: unrolled, all BK columns would be in registers at once
        for part_k in tl.range(start_k, start_k + BK, PART, num_stages=1):
            o_k = (part_k + tl.arange(0, PART))[None, :]
            at = q + base * q_t + head_offset(k_head, q_h, H) + r[:, None] * q_t + o_k * q_k
            qt = tl.load(at, mask=inside[:, None], other=0.0)
            at = k + base * k_t + head_offset(k_head, k_h, H) + r[:, None] * k_t + o_k * k_k
            kt = tl.load(at, mask=inside[:, None], other=0.0)
            seen = tl.dot(qt, tl.trans(kt), seen, input_precision=PRECISION)
            alike = tl.dot(kt, tl.trans(kt), alike, input_precision=PRECISION)
            if L2NORM:
                # for its diagonal: sums along the rows of q take longer
                own = tl.dot(qt, tl.trans(qt), own, input_precision=PRECISION)
    n_q = tl.full([CHUNK], 1.0, tl.float32) * scale
    n_k = tl.full([CHUNK], 1.0, tl.float32)
    diagonal = r[:, None] == r[None, :]
    if bounds is not None:
        longest = tl.max(tl.where(diagonal, alike, 0.0))  # |k|^2
    if L2NORM:
        n_q = tl.rsqrt(tl.sum(tl.where(diagonal, own, 0.0), 1) + 1e-6) * scale
        n_k = tl.rsqrt(tl.sum(tl.where(diagonal, alike, 0.0), 1) + 1e-6)
        tl.store(k_factor + program.to(tl.int64) * CHUNK + r, n_k)
    alike = alike * n_k[:, None] * n_k[None, :]
    below = r[:, None] // 16 >= r[None, :] // 16
    tile = r[:, None] * CHUNK + r[None, :]
    keys += program.to(tl.int64) * (CHUNK * CHUNK)
    tl.store(keys + tile, alike.to(keys.dtype.element_ty), mask=below)
    seen = seen * n_q[:, None] * n_k[None, :]
    seen = tl.where(r[:, None] >= r[None, :], seen, 0.0)
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
        weights = factors + chunk * (4 * CHUNK) + r
        tl.store(weights, G)
        tl.store(weights + CHUNK, tl.exp2(G) * -n_k)
        tl.store(weights + 2 * CHUNK, tl.exp2(G) * n_q)
        tl.store(weights + 3 * CHUNK, tl.exp2(_apart(total, G, total_low, low, WIDE)) * n_k)
        if bounds is not None:
            of_head = beta + base * beta_t + head * beta_h
            written = tl.load(of_head + r * beta_t, mask=inside, other=0.0) * longest
            shrinks = tl.min((tl.abs(written - 1.0) <= 1.0).to(tl.int32), 0) != 0
            tl.store(bounds + chunk, tl.where(shrinks, total, UNBOUNDED))
        apart = _apart(G[:, None], G[None, :], low[:, None], low[None, :], WIDE)
        decayed = seen * tl.exp2(apart)
        rows = attention + chunk * (CHUNK * CHUNK)
        tl.store(rows + tile, rounded(decayed, attention.dtype.element_ty), mask=below)


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def invert(
    beta, keys, inverse, factors, decay_low, cu_seqlens, state_indices, N, T,
    beta_t, beta_h, cu_s, state_indices_s, H: tl.constexpr, HV: tl.constexpr, PAD: tl.constexpr,
    LOW: tl.constexpr, PRECISION: tl.constexpr, OVERLAPS: tl.constexpr,
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
    left = end - first
    beta += first.to(tl.int64) * beta_t + head * beta_h
    b0, b1, b2, b3 = _load_vectors(beta, beta_t, left)
    if OVERLAPS:
        # nothing is stored before this and no program ends without it
        tl.extra.cuda.gdc_wait()
    WIDE: tl.constexpr = decay_low is not None
    factors += program.to(tl.int64) * (4 * CHUNK)
    G = _load_vectors(factors, 1, CHUNK)
    low = G
    if WIDE:
        decay_low += program.to(tl.int64) * CHUNK
        low = _load_vectors(decay_low, 1, CHUNK)
    keys += (place.to(tl.int64) * H + head // (HV // H)) * (CHUNK * CHUNK)
    inverse += program.to(tl.int64) * (CHUNK * CHUNK)
    k00, k10, k11, k22, k32, k33 = _load_halves(keys, left)
    r0 = _invert_block(_overlap(k00, b0, LOW), LOW, PRECISION)
    r1 = _invert_block(_overlap(k11, b1, LOW), LOW, PRECISION)
    r2 = _invert_block(_overlap(k22, b2, LOW), LOW, PRECISION)
    r3 = _invert_block(_overlap(k33, b3, LOW), LOW, PRECISION)
    k20, k21, k30, k31 = _load_join(keys, left)
    _store_decayed(inverse, r0, factors, decay_low, G, low, b0, 0, 0, WIDE)
    _store_decayed(inverse, r1, factors, decay_low, G, low, b1, 1, 1, WIDE)
    _store_decayed(inverse, r2, factors, decay_low, G, low, b2, 2, 2, WIDE)
    _store_decayed(inverse, r3, factors, decay_low, G, low, b3, 3, 3, WIDE)
    # two inverted halves make the inverse of the whole: R_low X R_high stands below the diagonal
    r10 = _product(r1, _overlap(k10, b1, LOW), None, LOW, PRECISION)
    r10 = _product(r10, r0, None, LOW, PRECISION)
    _store_decayed(inverse, r10, factors, decay_low, G, low, b0, 1, 0, WIDE)
    r32 = _product(r3, _overlap(k32, b3, LOW), None, LOW, PRECISION)
    r32 = _product(r32, r2, None, LOW, PRECISION)
    _store_decayed(inverse, r32, factors, decay_low, G, low, b2, 3, 2, WIDE)
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
    _store_decayed(inverse, r20, factors, decay_low, G, low, b0, 2, 0, WIDE)
    _store_decayed(inverse, r30, factors, decay_low, G, low, b0, 3, 0, WIDE)
    _store_decayed(inverse, r21, factors, decay_low, G, low, b1, 2, 1, WIDE)
    _store_decayed(inverse, r31, factors, decay_low, G, low, b1, 3, 1, WIDE)
