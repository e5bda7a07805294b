# SPDX-License-Identifier: Apache-2.0
"""One token per sequence: the recurrence alone, and the step from the projection to the output."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_backend_triton.conv1d import make_conv1d_update
from gdn_backend_triton.decode_tiles import (
    GATED_TILES,
    STEP_TILES,
    TILES,
    Choice,
    choices_of,
    pick,
)
from gdn_backend_triton.deferred_decode import make_deferred
from gdn_backend_triton.gated_rms_norm import make_gated_rms_norm, norm_and_gate
from gdn_backend_triton.launch import (
    STEP_SIZES,
    STEP_TENSORS,
    empty_like,
    refuse_gradients,
)
from gdn_backend_triton.launches import Launch
from gdn_backend_triton.maths import add_pairs, add_triples, gates, rounded
from gdn_backend_triton.overlap import begin
from gdn_portable.interface import DecodeStep, RecurrentDecode
from gdn_portable.metadata import DeferredUpdates, GdnParams, check_deferred
from gdn_portable.spec import Device, GdnSpec
from gdn_portable.state import StatePool
from gdn_portable.steps import apply_gate, both_pools, check_gate


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def _decode(
    q, k, v, a, b, A_log, dt_bias, state, state_indices, out_state_indices, gate, weight, out, eps,
    q_t, q_h, q_k, k_t, k_h, k_k, v_t, v_h, v_v, a_t, a_h, b_t, b_h, A_log_h, dt_bias_h, state_s,
    source_t, target_t, gate_t, gate_h, gate_v, weight_v, out_t, out_h, out_v,
    state_h: tl.constexpr, state_v: tl.constexpr, state_k: tl.constexpr, K_START: tl.constexpr,
    V_START: tl.constexpr, HV: tl.constexpr, RATIO: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, BV: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr, PAD: tl.constexpr,
    SCALE: tl.constexpr, L2NORM: tl.constexpr, SILU: tl.constexpr, LATE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    # for q, k and v of the kernel in front, behind the state's loads
    WAITS: tl.constexpr = OVERLAPS and LATE
    if not WAITS:
        begin(OVERLAPS)
    # a program owns BV rows of one head of one sequence, whatever the batch around them, and takes
    # them in panels of BP; the loads of a panel are issued before the sums of the one before it
    SPLIT: tl.constexpr = K // BK
    PANELS: tl.constexpr = BV // BP
    program = tl.program_id(0)
    first = program % (V // BV) * BV
    h = program // (V // BV) % HV
    t = (program // (V // BV * HV)).to(tl.int64)
    rows = first + tl.arange(0, BV)
    panel_rows = first + tl.arange(0, BP)
    columns = tl.arange(0, SPLIT)[:, None] * BK + tl.arange(0, BK)[None, :]
    q += t * q_t + h // RATIO * q_h + columns * q_k
    k += t * k_t + K_START + h // RATIO * k_h + columns * k_k
    v += t * v_t + V_START + h * v_h + panel_rows * v_v
    out += t * out_t + h * out_h + rows * out_v

    # nothing that has to wait for a load stands before the state's loads
    source = tl.load(state_indices + t * source_t).to(tl.int64)
    target = source
    if out_state_indices is not None:
        target = tl.load(out_state_indices + t * target_t).to(tl.int64)
    decay_input = tl.load(a + t * a_t + h * a_h)
    write_input = tl.load(b + t * b_t + h * b_h)
    log_rate = tl.load(A_log + h * A_log_h)
    bias = tl.load(dt_bias + h * dt_bias_h)
    if gate is not None:
        gates_t = tl.load(gate + t * gate_t + h * gate_h + rows * gate_v)
        weights = tl.load(weight + rows * weight_v)
    if not WAITS:
        query, key, value = tl.load(q), tl.load(k), tl.load(v)
    if source <= PAD:
        if WAITS:
            tl.extra.cuda.gdc_wait()
        tl.store(out, tl.zeros([BV], out.dtype.element_ty))
        return
    # loaded as [SPLIT * BP, BK], where only one layout is natural: BK over few lanes, so that most
    # of a row's sum lies within a lane
    i = tl.arange(0, SPLIT * BP)[:, None]
    tile = (i // BP * BK + tl.arange(0, BK)[None, :]) * state_k + (first + i % BP) * state_v
    tile += h * state_h
    old = state + source * state_s + tile
    new = state + target * state_s + tile
    S = tl.load(old)
    if WAITS:
        # the convolution has waited for all before it, so only its output is waited for; nothing
        # is stored before this, and no program ends without it, so what is launched next finds
        # both done, in a stream and in a captured graph alike
        tl.extra.cuda.gdc_wait()
        query, key, value = tl.load(q), tl.load(k), tl.load(v)

    query, key = query.to(tl.float32), key.to(tl.float32)
    qq, kk, qk = tl.reduce((query * query, key * key, query * key), None, add_triples)
    q_scale, k_scale = SCALE, 1.0
    if L2NORM:
        q_scale, k_scale = tl.rsqrt(qq + 1e-6) * SCALE, tl.rsqrt(kk + 1e-6)
    g, beta = gates(decay_input, write_input, log_rate, bias)
    decay = tl.exp(g)
    query, key = query[:, None, :], key[:, None, :]
    y = tl.zeros([BP, PANELS], tl.float32)
    for panel in tl.static_range(PANELS):
        if panel + 1 < PANELS:
            next_S = tl.load(old + (panel + 1) * BP * state_v)
            next_value = tl.load(v + (panel + 1) * BP * v_v)
        S = tl.reshape(S.to(tl.float32), [SPLIT, BP, BK])
        # S k and S q of the old state in one pass; the update adds u (k q) to the output
        seen, read = tl.reduce(tl.reduce((S * key, S * query), 0, add_pairs), 1, add_pairs)
        u = beta * (value.to(tl.float32) - decay * k_scale * seen) * k_scale
        read = q_scale * (decay * read + u * qk)
        y = tl.where(tl.arange(0, PANELS)[None, :] == panel, read[:, None], y)
        S = tl.reshape(decay * S + u[None, :, None] * key, [SPLIT * BP, BK])
        if target > PAD:
            tl.store(new + panel * BP * state_v, rounded(S, state.dtype.element_ty))
        if panel + 1 < PANELS:
            S, value = next_S, next_value
    y = tl.reshape(tl.trans(y), [BV])
    if gate is not None:
        y = norm_and_gate(y, gates_t, weights, eps, V, SILU)
    tl.store(out, y.to(out.dtype.element_ty))


def _make_launch(
    spec: GdnSpec, device: Device, *, starts: tuple[int, int] | None
) -> Callable[..., None]:
    """Return what launches the kernel.

    Args:
        spec: the layer.
        device: where.
        starts: first columns of k and v in what the convolution in front writes; None without one.
    """
    kernel = functools.cache(lambda num_warps: Launch(_decode, device, num_warps=num_warps))
    HV, K, V = spec.num_v_heads, spec.head_k_dim, spec.head_v_dim
    constants = (*(starts or (0, 0)), HV, HV // spec.num_k_heads, K, V)
    rules = (spec.pad_slot, spec.q_scale, spec.qk_l2norm, spec.gate_activation == "silu")
    rules += (starts is not None,)

    def launch(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        state: Tensor,
        source: Tensor,
        target: Tensor | None,
        gate: Tensor | None,
        weight: Tensor | None,
        eps: float,
        out: Tensor,
        qkv_strides: tuple[int, ...],
        choice: Choice,
    ) -> None:
        BV, BP, BK, num_warps = choice
        gate_strides: tuple[int, ...] = (0, 0, 0) if gate is None else gate.stride()
        if len(gate_strides) == 2:
            gate_strides = (gate_strides[0], V * gate_strides[1], gate_strides[1])
        state_s, *state_strides = state.stride()
        kernel(num_warps)(
            out.shape[0] * HV * (V // BV),
            (q, k, v, a, b, A_log, dt_bias, state, source, target, gate, weight, out),
            (),
            (eps, *qkv_strides, *a.stride(), *b.stride(), *A_log.stride(), *dt_bias.stride(),
             state_s, *source.stride(), 0 if target is None else target.stride(0), *gate_strides,
             0 if weight is None else weight.stride(0), *out.stride(), *state_strides, *constants,
             BV, BP, BK, *rules),
        )  # fmt: skip

    return launch


def make_recurrent_decode(spec: GdnSpec, device: Device, *, deterministic: bool) -> RecurrentDecode:
    """Return the op. A row's result depends on the tile and not on the batch around it."""
    HV = spec.num_v_heads
    choices = choices_of(TILES, spec, device, deterministic=deterministic)
    launch = _make_launch(spec, device, starts=None)
    launch_deferred = make_deferred(spec, device, starts=None)

    def recurrent_decode(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        state: Tensor,
        *,
        state_indices: Tensor,
        out_state_indices: Tensor | None = None,
        deferred: DeferredUpdates | None = None,
        num_deferred: Tensor | None = None,
        flush: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        refuse_gradients(q)
        check_deferred(deferred, num_deferred, flush)
        if out is None:
            out = empty_like(v)
        heads = v.shape[0] * HV
        inputs = q, k, v, a, b, A_log, dt_bias, state
        qkv_strides = (*q.stride(), *k.stride(), *v.stride())
        if heads and deferred is not None:
            launch_deferred(
                *inputs, deferred, state_indices, out_state_indices, num_deferred, flush, out,
                qkv_strides,
            )  # fmt: skip
        elif heads:
            launch(
                *inputs, state_indices, out_state_indices, None, None, 0.0, out, qkv_strides,
                pick(choices, heads),
            )  # fmt: skip
        return out

    return recurrent_decode


def make_decode_step(spec: GdnSpec, device: Device, *, deterministic: bool) -> DecodeStep:
    """Return the op: the convolution's launch, and the recurrence's with the norm in it.

    From Hopper on the second starts while the first still runs and loads its states meanwhile.
    Where the table has no program own a whole head, the norm is a third launch.
    """
    HV, K, V, D = spec.num_v_heads, spec.head_k_dim, spec.head_v_dim, spec.conv_dim
    key_dim, _, value_dim = spec.conv_groups
    plain = choices_of(STEP_TILES, spec, device, deterministic=deterministic)
    gated = choices_of(GATED_TILES, spec, device, deterministic=deterministic)
    conv1d_update = make_conv1d_update(spec, device, deterministic=deterministic)
    gated_rms_norm = make_gated_rms_norm(spec, device, deterministic=deterministic)
    starts = key_dim, D - value_dim
    launch = _make_launch(spec, device, starts=starts)
    launch_deferred = make_deferred(spec, device, starts=starts)
    qkv_strides = (D, K, 1, D, K, 1, D, V, 1)

    def decode_step(
        mixed_qkv: Tensor,
        a: Tensor,
        b: Tensor,
        params: GdnParams,
        pool: StatePool,
        *,
        state_indices: Tensor,
        out_state_indices: Tensor | None = None,
        deferred: DeferredUpdates | None = None,
        num_deferred: Tensor | None = None,
        flush: Tensor | None = None,
        gate: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        refuse_gradients(mixed_qkv)
        conv_state, state = both_pools(pool)
        check_gate(gate, params)
        check_deferred(deferred, num_deferred, flush)
        B, dtype = mixed_qkv.shape[0], mixed_qkv.dtype
        if out is None:
            out = torch.empty(B, HV, V, dtype=dtype, device=mixed_qkv.device)
        if not B:
            return out
        mixed = empty_like(mixed_qkv)
        conv1d_update(
            mixed_qkv, params.conv_weight, params.conv_bias, conv_state,
            state_indices=state_indices, out_state_indices=out_state_indices, out=mixed,
        )  # fmt: skip
        inputs = mixed, mixed, mixed, a, b, params.A_log, params.dt_bias, state
        if deferred is not None:
            launch_deferred(
                *inputs, deferred, state_indices, out_state_indices, num_deferred, flush, out,
                qkv_strides,
            )  # fmt: skip
            return apply_gate(out, gate, params, gated_rms_norm, out=out)
        # the gate that the recurrence applies, and the one that is left to a third launch
        choice, fused, left = pick(plain, B * HV), None, gate
        if gate is not None and (whole := pick(gated, B * HV)).BV == V:
            choice, fused, left = whole, gate, None
        launch(
            *inputs, state_indices, out_state_indices, fused, params.norm_weight, params.norm_eps,
            out, qkv_strides, choice,
        )  # fmt: skip
        return apply_gate(out, left, params, gated_rms_norm, out=out)

    return decode_step
