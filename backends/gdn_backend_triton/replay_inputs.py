# SPDX-License-Identifier: Apache-2.0
"""What verification by replay multiplies states with: rows of keys and queries, values, solutions.

A program owns the query and key of one head, or as many channels of v. It runs the convolution on
the new drafts where there is one, puts what is pending beside them and keeps the new in its place.
That of a head then solves the R x R problem of each value head, see the module ``replay``: by
substitution, which is exact where a token repeats.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn_backend_triton.conv1d_verify import ancestors, window_before
from gdn_backend_triton.launch import STEP_SIZES, STEP_TENSORS
from gdn_backend_triton.maths import gates, rounded, upper_half
from gdn_backend_triton.overlap import begin
from gdn_backend_triton.taps import convolve, load_bias, load_weight, store_window


@triton.jit
def place(
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
        pending = tl.minimum(tl.maximum(pending.to(tl.int32), 0), ROOM)
    start = sequence * P
    count = start * 0 + P
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + sequence * cu_b).to(tl.int32)
        end = tl.load(cu_seqlens + (sequence + 1) * cu_b, mask=is_sequence, other=T).to(tl.int32)
        count = end - start
    return slot, pending, start.to(tl.int64), count


@triton.jit
def _column(k, WIDTH: tl.constexpr):
    """Return where column ``k`` of X is stored, as ``replay`` interleaves those of the state."""
    inside = k % WIDTH // 2 * 8 + k // WIDTH % 4 * 2 + k % 2
    return k // (4 * WIDTH) * (4 * WIDTH) + inside


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
def _gates_of_heads(
    a, b, A_log, dt_bias, kept_g, kept_beta, pending, count, a_t, a_h, b_t, b_h, A_log_h,
    dt_bias_h, kept_g_p, kept_g_h, kept_beta_p, kept_beta_h, HEADS: tl.constexpr,
    ROOM: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Return g and beta of every head: of what is pending, then of the new keys; 0 elsewhere."""
    r = tl.arange(0, R)
    j = r - ROOM
    is_key = (j >= 0) & (j < count)
    g_of_heads = tl.tuple([])
    beta_of_heads = tl.tuple([])
    for n in tl.static_range(HEADS):
        g = tl.load(kept_g + r * kept_g_p + n * kept_g_h, mask=r < pending, other=0.0)
        beta = tl.load(kept_beta + r * kept_beta_p + n * kept_beta_h, mask=r < pending, other=0.0)
        g_new, beta_new = gates(
            tl.load(a + j * a_t + n * a_h, mask=is_key, other=0.0),
            tl.load(b + j * b_t + n * b_h, mask=is_key, other=0.0),
            tl.load(A_log + n * A_log_h),
            tl.load(dt_bias + n * dt_bias_h),
        )
        g_of_heads = g_of_heads + (tl.where(is_key, g_new, g),)
        beta_of_heads = beta_of_heads + (tl.where(is_key, beta_new, beta),)
    return g_of_heads, beta_of_heads


@triton.jit
def _solve(
    rows_of_X, solution, g_of_heads, beta_of_heads, parents, parents_p, scale, count,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    ROOM: tl.constexpr, R: tl.constexpr, RK: tl.constexpr, RP: tl.constexpr,
    SIZE: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Solve the problems of HEADS value heads that share the rows of X.

    ``solution`` has per head: row 0, what scales S X; row 1, what scales D for the update, then
    the state's decay; then what row i of D sums, as three terms of bfloat16, [3, R, R]; behind
    them what substitution adds.
    """
    KEYS: tl.constexpr = ROOM + P
    SOLVED: tl.constexpr = 2 * R + 3 * R * R // 2
    r1 = tl.arange(0, R)
    r = r1[:, None]
    c = r1[None, :]
    # a query has its key and the keys above it
    last = tl.where(r1 < KEYS, r1, r1 - P)
    above = (c <= last[:, None]) & (c < KEYS)
    if parents is not None:
        path = _path(parents, parents_p, last - ROOM, count, P)
        above &= (c < ROOM) | ((path[:, None] >> tl.maximum(c - ROOM, 0)) & 1 == 1)
    BK: tl.constexpr = min(K, 64)
    rows_of_X += r * K + tl.arange(0, BK)[None, :]
    products = tl.zeros([R, R], tl.float32)
    for n in tl.static_range(K // BK):
        X = tl.load(rows_of_X + n * BK, mask=r < KEYS + P, other=0.0)
        products = tl.dot(X, tl.trans(X), products, input_precision=PRECISION)
    norm = tl.where(r1 < KEYS, 1.0, scale)
    if NORM:
        diagonal = tl.where(r == c, products, 0.0)
        inverse = tl.rsqrt(tl.sum(diagonal, 1) + 1e-6)
        norm *= inverse
        products *= norm[:, None] * inverse[None, :]
    else:
        products *= norm[:, None]
    for n in tl.static_range(HEADS):
        # sums between two rows are differences of sums to the first: exact in what is a multiple
        # of 2^-10, so that a strong decay does not blur the weak ones; below -104 exp is 0
        g = tl.where(g_of_heads[n] < -104.0, -104.0, g_of_heads[n])
        coarse = (g + 12288.0) - 12288.0
        fine = g - coarse
        if parents is None:
            G = tl.gather(tl.cumsum(coarse, 0), last, 0)
            G_fine = tl.gather(tl.cumsum(fine, 0), last, 0)
        else:
            G = tl.sum(tl.where(above, coarse[None, :], 0.0), 1)
            G_fine = tl.sum(tl.where(above, fine[None, :], 0.0), 1)
        decay = tl.exp((G[:, None] - G[None, :]) + (G_fine[:, None] - G_fine[None, :]))
        E = tl.where(above, products * decay, 0.0)
        # rows of keys as substitution adds them, with what it starts from on the diagonal
        beta = beta_of_heads[n][:, None]
        E = tl.where(r < KEYS, tl.where(c < r, -beta * E, beta), E)
        tl.store(solution + SOLVED + r * RK + c, E, mask=(r < KEYS + P) & (c < KEYS))
        tl.store(solution + r1, norm * tl.exp(G + G_fine), mask=r1 < KEYS + P)
        is_old = r1 < ROOM
        G_old = tl.sum(tl.where(is_old, coarse, 0.0), 0)
        G_fine_old = tl.sum(tl.where(is_old, fine, 0.0), 0)
        left = norm * tl.exp((G_old - G) + (G_fine_old - G_fine))
        left = tl.where(is_old, left, tl.exp(G_old + G_fine_old))
        tl.store(solution + R + r1, left, mask=r1 <= ROOM)
        solution += SIZE
    solution -= HEADS * SIZE
    # other threads load what a thread has stored
    tl.debug_barrier()

    o = tl.arange(0, GROUP * RK)[None, :]
    head = o // RK
    c = o % RK
    r = tl.arange(0, RK)[:, None]
    t = tl.arange(0, RP)[:, None]
    mask = (head < HEADS) & (c < KEYS)
    work = solution + SOLVED + head * SIZE
    start = tl.load(work + c * (RK + 1), mask=mask, other=0.0)
    solved = tl.zeros([RK, GROUP * RK], tl.float32)
    asked = tl.zeros([RP, GROUP * RK], tl.float32)
    if R == 16:
        factors = tl.tuple([])
        for i in tl.static_range(KEYS + P):
            value = tl.load(work + i * RK + r, mask=mask & (r < min(i, KEYS)), other=0.0)
            factors = factors + (value,)
        for i in tl.static_range(KEYS):
            row = tl.where(c == i, start, 0.0) + tl.sum(factors[i] * solved, 0)[None, :]
            solved = tl.where(r == i, row, solved)
        for i in tl.static_range(P):
            row = tl.sum(factors[KEYS + i] * solved, 0)[None, :]
            asked = tl.where(t == i, row, asked)
    else:
        for i in range(KEYS):
            value = tl.load(work + i * RK + r, mask=mask & (r < i), other=0.0)
            row = tl.where(c == i, start, 0.0) + tl.sum(value * solved, 0)[None, :]
            solved = tl.where(r == i, row, solved)
        for i in range(P):
            value = tl.load(work + (KEYS + i) * RK + r, mask=mask & (r < KEYS), other=0.0)
            asked = tl.where(t == i, tl.sum(value * solved, 0)[None, :], asked)
    target = (solution + 2 * R + head * SIZE).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    target += c
    for i in tl.static_range(3):
        term, solved = upper_half(solved)
        tl.store(target + (i * R + r) * R, term, mask=mask & (r < ROOM))
        term, asked = upper_half(asked)
        tl.store(target + (i * R + KEYS + t) * R, term, mask=mask & (t < P))


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def prepare(
    q, k, v, weight, bias, conv_state, conv_inputs, a, b, A_log, dt_bias, state_indices,
    num_accepted, cu_seqlens, parents, kept_k, kept_v, kept_g, kept_beta, rows_of_X, values,
    solution, B, T, scale,
    q_t, q_h, k_t, k_h, v_t, v_h, q_d, weight_d, weight_w, bias_d, conv_s, conv_d, conv_l,
    inputs_s, inputs_p, inputs_d, a_t, a_h, b_t, b_h, A_log_h, dt_bias_h,
    indices_b, accepted_b, cu_b, parents_b, parents_p, kept_k_s, kept_k_p, kept_k_h, kept_k_k,
    kept_v_s, kept_v_p, kept_v_h, kept_v_v, kept_g_s, kept_g_p, kept_g_h,
    kept_beta_s, kept_beta_p, kept_beta_h,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    P: tl.constexpr, ROOM: tl.constexpr, R: tl.constexpr, RK: tl.constexpr, RP: tl.constexpr,
    GROUP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr,
    NORM: tl.constexpr, SILU: tl.constexpr, PRECISION: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Fill ``rows_of_X``, ``values`` and ``solution``, and keep the new drafts.

    With ``weight`` q is the convolution's input and k and v are not read.
    """
    begin(OVERLAPS)
    KEYS: tl.constexpr = ROOM + P
    HEADS: tl.constexpr = HV // H
    PARTS: tl.constexpr = H + (HV * V + 2 * K - 1) // (2 * K)
    part = tl.program_id(0) % PARTS
    sequence = tl.program_id(0) // PARTS
    slot, pending, row, count = place(
        state_indices, num_accepted, cu_seqlens, indices_b, accepted_b, cu_b, sequence, B, T,
        P, ROOM, PAD,
    )  # fmt: skip
    count = tl.minimum(count, P)
    if parents is not None:
        parents += sequence.to(tl.int64) * parents_b
    # a head's query and key, or channels of v
    is_head = part < H
    o = tl.arange(0, 2 * K)
    first_v = (part - H) * (2 * K)
    mask = is_head | (first_v + o < HV * V)
    first = tl.where(is_head, part * K, 2 * H * K + first_v)
    channel = first + o + o // K * tl.where(is_head, (H - 1) * K, 0)
    if weight is not None:
        x = q + row * q_t + channel * q_d
        STEP: tl.constexpr = 1 if parents is None else W
        if parents is None:
            drafted = tl.tuple([])
            for t in tl.static_range(P):
                value = tl.load(x + t * q_t, mask=mask & (t < count), other=0.0)
                drafted = drafted + (value.to(tl.float32),)
        columns = load_weight(weight, channel, mask, weight_d, weight_w, W)
        offset = load_bias(bias, channel, mask, bias_d)
    if slot <= PAD:
        return

    if weight is not None:
        window = conv_state + slot * conv_s + channel * conv_d
        conv_inputs += slot * inputs_s + channel * inputs_d
        accepted = None if num_accepted is None else pending
        history = window_before(
            window, conv_l, conv_inputs, inputs_p, accepted, mask, W, W - 1, "replay"
        )
    kept_k += slot * kept_k_s + part * kept_k_h
    rows_of_X += (sequence.to(tl.int64) * H + part) * (R * K)
    # blocks of channels are heads of v, some or part of one
    head_v = first_v // V + o // V
    o_v = o % V
    if V > 2 * K:
        o_v += first_v % V
    kept_values = kept_v + slot * kept_v_s + head_v * kept_v_h + o_v * kept_v_v
    rows_of_values = values + sequence.to(tl.int64) * (KEYS * HV * V) + first_v + o
    if is_head:
        o_k = tl.arange(0, K)
        keys = tl.tuple([])
        for r in tl.static_range(ROOM):
            source = kept_k + r * kept_k_p + o_k * kept_k_k
            keys = keys + (tl.load(source, mask=(r < pending) & (o_k >= 0), other=0.0),)
        for r in tl.static_range(ROOM):
            tl.store(rows_of_X + r * K + _column(o_k, WIDTH), keys[r])
    else:
        old_values = tl.tuple([])
        for r in tl.static_range(ROOM):
            value = tl.load(kept_values + r * kept_v_p, mask=mask & (r < pending), other=0.0)
            old_values = old_values + (value,)
        for r in tl.static_range(ROOM):
            tl.store(rows_of_values + r * (HV * V), old_values[r], mask=mask)
    head = tl.minimum(part, H - 1) * HEADS
    kept_g += slot * kept_g_s + head * kept_g_h
    kept_beta += slot * kept_beta_s + head * kept_beta_h
    g, beta = _gates_of_heads(
        a + row * a_t + head * a_h, b + row * b_t + head * b_h, A_log + head * A_log_h,
        dt_bias + head * dt_bias_h, kept_g, kept_beta, pending, count, a_t, a_h, b_t, b_h,
        A_log_h, dt_bias_h, kept_g_p, kept_g_h, kept_beta_p, kept_beta_h, HEADS, ROOM, R,
    )  # fmt: skip
    if weight is not None:
        if parents is None:
            inputs = history + drafted
        else:
            inputs = ancestors(history, x, q_t, parents, parents_p, count, mask, P, W)
        drafts = tl.tuple([])
        for t in tl.static_range(P):
            y = convolve(inputs, t * STEP, columns, offset, W, SILU)
            y = rounded(tl.where(t < count, y, 0.0), rows_of_X.dtype.element_ty)
            drafts = drafts + (y,)
    else:
        drafts = tl.tuple([])
        for t in tl.static_range(P):
            there = t < count
            if is_head:
                at = q + (row + t) * q_t + part * q_h + o
                value = tl.load(at, mask=there & (o < K), other=0.0)
                at = k + (row + t) * k_t + part * k_h + o - K
                value += tl.load(at, mask=there & (o >= K), other=0.0)
            else:
                at = v + (row + t) * v_t + head_v * v_h + o_v
                value = tl.load(at, mask=there & mask, other=0.0)
            drafts = drafts + (value,)
    if is_head:
        target = rows_of_X + tl.where(o < K, KEYS, ROOM) * K + _column(o % K, WIDTH)
        for t in tl.static_range(P):
            tl.store(target + t * K, drafts[t])
    else:
        for t in tl.static_range(P):
            tl.store(rows_of_values + (ROOM + t) * (HV * V), drafts[t], mask=mask)

    # other threads may store what a thread has yet to load, and load what it has stored
    tl.debug_barrier()
    if weight is not None:
        if num_accepted is not None:
            store_window(window, conv_l, history, mask & (pending > 0), W)
        for t in tl.static_range(P):
            raw = inputs[t * STEP + W - 1].to(conv_inputs.dtype.element_ty)
            tl.store(conv_inputs + t * inputs_p, raw, mask=mask & (t < count))
    if is_head:
        for t in tl.static_range(P):
            target = kept_k + t * kept_k_p + (o - K) * kept_k_k
            tl.store(target, drafts[t], mask=(o >= K) & (t < count))
        j = tl.arange(0, R) - ROOM
        is_key = (j >= 0) & (j < count)
        for n in tl.static_range(HEADS):
            tl.store(kept_g + j * kept_g_p + n * kept_g_h, g[n], mask=is_key)
            tl.store(kept_beta + j * kept_beta_p + n * kept_beta_h, beta[n], mask=is_key)
        _solve(
            rows_of_X, solution + (sequence * HV + head).to(tl.int64) * SIZE, g, beta, parents,
            parents_p, scale, count, HEADS, GROUP, K, P, ROOM, R, RK, RP, SIZE, NORM, PRECISION,
        )  # fmt: skip
    else:
        for t in tl.static_range(P):
            tl.store(kept_values + t * kept_v_p, drafts[t], mask=mask & (t < count))
