# SPDX-License-Identifier: Apache-2.0
"""Libraries that need not be installed: modules with their functions' parameters and maths.

Every function notes the keywords of its calls. What it computes is what the library documents, by
a loop over tokens, so that an adapter that mistakes a gate or a layout gives another result.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

Calls = list[tuple[str, dict[str, Any]]]
SGLANG = "sglang.kernels.ops"


def install(monkeypatch: pytest.MonkeyPatch, calls: Calls, *libraries: str) -> None:
    """Make ``libraries`` importable until the test ends; their calls go to ``calls``."""
    for name, functions in MODULES.items():
        if name.partition(".")[0] not in libraries:
            continue
        for module in (name.partition(".")[0], name):
            if module not in sys.modules:
                monkeypatch.setitem(sys.modules, module, _module(module))
        for function in functions:
            recorded = _recorded(f"{name.partition('.')[0]}.{function.__name__}", function, calls)
            setattr(sys.modules[name], function.__name__, recorded)


def _module(name: str) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    return module


def _recorded(name: str, function: Callable[..., Any], calls: Calls) -> Callable[..., Any]:
    def call(**kwargs: Any) -> Any:
        calls.append((name, kwargs))
        return function(**kwargs)

    return call


def _gates(A_log: Tensor, a: Tensor, dt_bias: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return -A_log.exp() * functional.softplus(a.float() + dt_bias), b.float().sigmoid()


def _rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float,
    norm: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Run one sequence [T, H, ...] from ``state`` [HV, V, K]; return o and the states after it."""
    q, k, v, state = q.float(), k.float(), v.float(), state.float()
    if norm:
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    ratio = v.shape[1] // q.shape[1]
    q, k = (x.repeat_interleave(ratio, 1) for x in (q * scale, k))
    outputs, states = [], []
    for t in range(len(q)):
        state = state * g[t].exp()[:, None, None]
        u = beta[t][:, None] * (v[t] - torch.einsum("hvk,hk->hv", state, k[t]))
        state = state + torch.einsum("hv,hk->hvk", u, k[t])
        outputs.append(torch.einsum("hvk,hk->hv", state, q[t]))
        states.append(state)
    return torch.stack(outputs), states


def _spans(cu_seqlens: Tensor) -> Iterable[tuple[int, slice]]:
    offsets = cu_seqlens.tolist()
    return enumerate(slice(*pair) for pair in zip(offsets, offsets[1:], strict=False))


def _convolve(x: Tensor, history: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve [T, D] after ``history`` [D, W - 1]; return rows and the inputs with history."""
    inputs = torch.cat([history, x.T], -1)
    W = weight.shape[1]
    taps = inputs.float().unfold(-1, W, 1)  # [D, T, W]
    rows = functional.silu((taps * weight.float()[:, None]).sum(-1)).T
    return rows.to(x.dtype), inputs


# flashinfer


def gated_delta_rule_decode_pretranspose(
    *, q, k, v, state, A_log, a, dt_bias, b, scale, output, use_qk_l2norm, initial_state,
    initial_state_indices, backend, intermediate_states_buffer=None, disable_state_update=False,
):  # fmt: skip
    assert state is None and backend == "flashinfer"
    assert (q.shape[1] > 1) is disable_state_update
    g, beta = _gates(A_log, a, dt_bias, b)
    for row, slot in enumerate(initial_state_indices.tolist()):
        tensors = (q[row], k[row], v[row], g[row], beta[row], initial_state[slot])
        o, states = _rule(*tensors, scale, use_qk_l2norm)
        output[row] = o
        if intermediate_states_buffer is not None:
            intermediate_states_buffer[row] = torch.stack(states)
        if not disable_state_update:
            initial_state[slot] = states[-1]
    return output, initial_state


def gated_delta_rule_mtp(
    *, q, k, v, initial_state, initial_state_indices, A_log, a, dt_bias, b, scale, output,
    disable_state_update, use_qk_l2norm, intermediate_states_buffer=None, ssm_state_indices=None,
):  # fmt: skip
    assert initial_state.dtype is torch.float32
    assert disable_state_update is (ssm_state_indices is None)
    g, beta = _gates(A_log, a, dt_bias, b)
    for row, slot in enumerate(initial_state_indices.tolist()):
        tensors = (q[row], k[row], v[row], g[row], beta[row], initial_state[slot])
        output[row], states = _rule(*tensors, scale, use_qk_l2norm)
        if ssm_state_indices is not None:
            initial_state[ssm_state_indices[row].long()] = torch.stack(states)
        else:
            intermediate_states_buffer[row] = torch.stack(states)
    return output, initial_state


def _flashinfer_chunk(
    *, q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens,
    use_qk_l2norm_in_kernel, output_state, use_cp, state_indices, max_seqlen, backend,
):  # fmt: skip
    assert output_state is initial_state and output_final_state and backend == "flashinfer"
    assert use_cp in ("auto", True, False)
    assert g.min() > 0 and g.max() <= 1  # linear decay
    out = torch.zeros_like(v)
    for row, span in _spans(cu_seqlens):
        assert span.stop - span.start <= max_seqlen
        slot = int(state_indices[row])
        tensors = (q[span], k[span], v[span], g[span].log(), beta[span], initial_state[slot])
        o, states = _rule(*tensors, scale, use_qk_l2norm_in_kernel)
        out[span], output_state[slot] = o.to(v.dtype), states[-1]
    return out, output_state


# flash-linear-attention and FlashQLA: batches [1, T], states in the order of the sequences


def _chunk(
    *, q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
    state_v_first, cu_seqlens, auto_cp=True, use_gate_in_kernel=False, A_log=None, dt_bias=None,
    use_beta_sigmoid_in_kernel=False,
):  # fmt: skip
    assert state_v_first and output_final_state
    assert len(initial_state) == len(cu_seqlens) - 1
    if use_gate_in_kernel:
        assert use_beta_sigmoid_in_kernel
        g, beta = _gates(A_log, g, dt_bias, beta)
    assert g.max() <= 0  # log decay
    out, finals = torch.zeros_like(v), []
    for row, span in _spans(cu_seqlens):
        tensors = (x[0, span] for x in (q, k, v, g, beta))
        o, states = _rule(*tensors, initial_state[row], scale, use_qk_l2norm_in_kernel)
        out[0, span] = o.to(v.dtype)
        finals.append(states[-1])
    return out, torch.stack(finals)


def fused_recurrent_gated_delta_rule(
    *, q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
    use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, state_v_first,
):  # fmt: skip
    assert use_gate_in_kernel and use_beta_sigmoid_in_kernel and state_v_first
    assert output_final_state
    g, beta = _gates(A_log, g, dt_bias, beta)
    rows = [
        _rule(*(x[n] for x in (q, k, v, g, beta)), initial_state[n], scale, use_qk_l2norm_in_kernel)
        for n in range(len(q))
    ]
    return torch.stack([o for o, _ in rows]).to(v.dtype), torch.stack([s[-1] for _, s in rows])


def _fla_conv_update(*, x, cache, weight, activation):
    assert activation == "silu" and cache.shape[-1] == weight.shape[1] and cache.is_contiguous()
    rows = []
    for n in range(len(x)):
        row, inputs = _convolve(x[n : n + 1], cache[n][:, 1:], weight)
        cache[n] = inputs[:, -weight.shape[1] :]
        rows.append(row)
    return torch.cat(rows), cache


def causal_conv1d(*, x, weight, initial_state, output_final_state, activation, cu_seqlens):
    assert activation == "silu" and output_final_state
    assert initial_state.shape == (len(cu_seqlens) - 1, x.shape[-1], weight.shape[1])
    rows = [_convolve(x[0, s], initial_state[n][:, 1:], weight)[0] for n, s in _spans(cu_seqlens)]
    return torch.cat(rows)[None], initial_state


def _fla_norm(*, x, g, weight, bias, activation, eps):
    assert bias is None and activation == "silu"
    y = x.float() * (x.float().square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()
    return (y * functional.silu(g.float())).to(x.dtype)


# SGLang: pools of states and windows


def _sglang_conv_update(
    *, x, conv_state, weight, activation, conv_state_indices, intermediate_conv_window=None,
    intermediate_state_indices=None,
):  # fmt: skip
    assert activation == "silu"
    out, W = torch.empty_like(x), weight.shape[1]
    for row, slot in enumerate(conv_state_indices.tolist()):
        tokens = x[row].T if x.dim() == 3 else x[row : row + 1]
        rows, inputs = _convolve(tokens, conv_state[slot], weight)
        out[row] = rows.T if x.dim() == 3 else rows[0]
        conv_state[slot] = inputs[:, -(W - 1) :]
        if intermediate_conv_window is not None:
            kept = inputs.unfold(-1, W - 1, 1)[:, 1:].transpose(0, 1)
            intermediate_conv_window[int(intermediate_state_indices[row])] = kept
    return out


def causal_conv1d_fn(
    *, x, weight, bias, conv_states, query_start_loc, seq_lens_cpu, cache_indices,
    has_initial_state, activation,
):  # fmt: skip
    assert bias is None and activation == "silu" and bool(has_initial_state.all())
    assert sum(seq_lens_cpu) == x.shape[1]
    out = torch.empty_like(x)
    for row, span in _spans(query_start_loc):
        slot = int(cache_indices[row])
        rows, inputs = _convolve(x[:, span].T, conv_states[slot], weight)
        out[:, span], conv_states[slot] = rows.T, inputs[:, -(weight.shape[1] - 1) :]
    return out


def fused_sigmoid_gating_delta_rule_update(
    *, A_log, a, dt_bias, softplus_beta, softplus_threshold, q, k, v, b, initial_state_source,
    initial_state_indices, scale, use_qk_l2norm_in_kernel, cu_seqlens, disable_state_update=False,
    intermediate_states_buffer=None, intermediate_state_indices=None, cache_steps=None,
    cache_ring=False, replayssm_rawv=None, replayssm_rawk=None, replayssm_g=None,
    replayssm_beta=None,
):  # fmt: skip
    assert (softplus_beta, softplus_threshold) == (1.0, 20.0)
    g, beta = _gates(A_log, a, dt_bias, b)
    out = torch.empty_like(v)
    for row, span in _spans(cu_seqlens):
        slot = int(initial_state_indices[row])
        tensors = (q[0, span], k[0, span], v[0, span], g[span], beta[span])
        o, states = _rule(*tensors, initial_state_source[slot], scale, use_qk_l2norm_in_kernel)
        out[0, span] = o.to(v.dtype)
        if cache_ring:
            assert disable_state_update
            for ring, rows in (
                (replayssm_rawv, v[0]), (replayssm_rawk, k[0]), (replayssm_g, g),
                (replayssm_beta, beta),
            ):  # fmt: skip
                ring[slot] = rows[span].transpose(0, 1)
        if intermediate_states_buffer is not None:
            intermediate_states_buffer[int(intermediate_state_indices[row])] = torch.stack(states)
        if not disable_state_update:
            initial_state_source[slot] = states[-1]
    return out


def commit_gdn_replayssm_fold_all_layers(
    *, checkpoint_state, rawv_cache, rawk_cache, g_cache, beta_cache, ssm_state_indices,
    accept_lens, max_cache_len, num_k_heads, use_qk_l2norm_in_kernel,
):  # fmt: skip
    assert rawk_cache.shape[2:4] == (num_k_heads, max_cache_len)
    for row, slot in enumerate(ssm_state_indices.tolist()):
        k, v, g, beta = (
            ring[0, slot].transpose(0, 1)[: int(accept_lens[row])]
            for ring in (rawk_cache, rawv_cache, g_cache, beta_cache)
        )
        state = checkpoint_state[0, slot]
        states = _rule(k, k, v, g, beta, state, 1.0, use_qk_l2norm_in_kernel)[1]
        checkpoint_state[0, slot] = states[-1]


def fused_recurrent_gated_delta_rule_packed_decode(
    *, mixed_qkv, a, b, A_log, dt_bias, scale, initial_state, out, ssm_state_indices,
    use_qk_l2norm_in_kernel,
):  # fmt: skip
    g, beta = _gates(A_log, a, dt_bias, b)
    HV, V, K = initial_state.shape[1:]
    qk = (mixed_qkv.shape[1] - HV * V) // 2
    q, k, v = mixed_qkv.split((qk, qk, HV * V), -1)
    q, k, v = q.unflatten(-1, (-1, K)), k.unflatten(-1, (-1, K)), v.unflatten(-1, (HV, V))
    for n, slot in enumerate(ssm_state_indices.tolist()):
        tensors = (x[n : n + 1] for x in (q, k, v, g, beta))
        out[n], states = _rule(*tensors, initial_state[slot], scale, use_qk_l2norm_in_kernel)
        initial_state[slot] = states[-1]
    return out, initial_state


def fused_recurrent_linear_replayssm_decode(
    *, mixed_qkv, a, b, A_log, dt_bias, scale, initial_state, d_cache, k_cache, g_cache, out,
    ssm_state_indices, write_pos, use_qk_l2norm_in_kernel,
):  # fmt: skip
    g, beta = _gates(A_log, a, dt_bias, b)
    HV, V, K = initial_state.shape[1:]
    qk, ratio = (mixed_qkv.shape[1] - HV * V) // 2, HV // k_cache.shape[1]
    q, k, v = mixed_qkv.split((qk, qk, HV * V), -1)
    q, k, v = q.unflatten(-1, (-1, K)), k.unflatten(-1, (-1, K)), v.unflatten(-1, (HV, V))
    for n, slot in enumerate(ssm_state_indices.tolist()):
        S, at = initial_state[slot].float(), int(write_pos[n])
        for j in range(at):
            key = k_cache[slot, :, j].float().repeat_interleave(ratio, 0)
            S = g_cache[slot, :, j].exp()[:, None, None] * S
            S = S + torch.einsum("hv,hk->hvk", d_cache[slot, :, j].float(), key)
        tensors = (x[n : n + 1] for x in (q, k, v, g, beta))
        out[n], states = _rule(*tensors, S, scale, use_qk_l2norm_in_kernel)
        if at == d_cache.shape[2] - 1:
            initial_state[slot] = states[-1]
    return out, initial_state


def _sglang_chunk(
    *, q, k, v, g, beta, scale, initial_state, initial_state_indices, cu_seqlens,
    use_qk_l2norm_in_kernel,
):  # fmt: skip
    out = torch.zeros_like(v)
    for row, span in _spans(cu_seqlens):
        slot = int(initial_state_indices[row])
        tensors = (x[0, span] for x in (q, k, v, g, beta))
        o, states = _rule(*tensors, initial_state[slot], scale, use_qk_l2norm_in_kernel)
        out[0, span], initial_state[slot] = o.to(v.dtype), states[-1]
    return out, None, None


def fused_gdn_gating(*, A_log, a, b, dt_bias):
    return tuple(x[None] for x in _gates(A_log, a, dt_bias, b))


def fused_mamba_state_scatter_with_mask(*, dst, src, dst_indices_raw, step_indices_raw):
    for row, (slot, step) in enumerate(
        zip(dst_indices_raw.tolist(), step_indices_raw.tolist(), strict=True)
    ):
        dst[:, slot] = src[:, row, step]


def _sglang_norm(*, x, z, weight, bias, activation, eps, is_rms_norm):
    assert is_rms_norm
    return _fla_norm(x=x, g=z, weight=weight, bias=bias, activation=activation, eps=eps)


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(**kwargs: Any) -> Any:
        return function(**kwargs)

    call.__name__ = name
    return call


MODULES: dict[str, tuple[Callable[..., Any], ...]] = {
    "flashinfer.gdn_decode": (gated_delta_rule_decode_pretranspose, gated_delta_rule_mtp),
    "flashinfer.gdn_prefill": (_named("chunk_gated_delta_rule", _flashinfer_chunk),),
    "fla.ops.gated_delta_rule": (
        _named("chunk_gated_delta_rule", _chunk),
        fused_recurrent_gated_delta_rule,
    ),
    "fla.modules.causal_conv1d": (_named("causal_conv1d_update", _fla_conv_update), causal_conv1d),
    "fla.modules.norm.fused_norm_gate": (_named("rms_norm_gated", _fla_norm),),
    "flash_qla": (_named("chunk_gated_delta_rule", _chunk),),
    f"{SGLANG}.mamba.causal_conv1d_triton": (
        _named("causal_conv1d_update", _sglang_conv_update),
        causal_conv1d_fn,
    ),
    f"{SGLANG}.mamba.mamba_state_scatter_triton": (fused_mamba_state_scatter_with_mask,),
    f"{SGLANG}.attention.linear.fused_sigmoid_gating_recurrent": (
        fused_sigmoid_gating_delta_rule_update,
    ),
    f"{SGLANG}.attention.linear.gdn_replayssm_spec_fold": (commit_gdn_replayssm_fold_all_layers,),
    f"{SGLANG}.attention.linear.fused_gdn_gating": (fused_gdn_gating,),
    f"{SGLANG}.attention.fla.fused_recurrent": (fused_recurrent_gated_delta_rule_packed_decode,),
    f"{SGLANG}.attention.linear.fused_recurrent_linear_replayssm": (
        fused_recurrent_linear_replayssm_decode,
    ),
    f"{SGLANG}.attention.fla.chunk": (_named("chunk_gated_delta_rule", _sglang_chunk),),
    f"{SGLANG}.attention.fla.layernorm_gated": (_named("rms_norm_gated", _sglang_norm),),
}
