# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's gated delta rule as it behaves on Hopper, in PyTorch for a CPU: a double for tests.

It keeps what its adapters have to live with: indices without padding, found by their address
alone; one index to read and to write, or in a newer release two, of which -1 is none; no row
without initial state; untouched empty sequences; a last chunk of the last sequence written whole;
bfloat16 inside; and an infinity times 0 where a gate is large.
"""

from __future__ import annotations

import ctypes
import inspect
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

CALLS: list[str] = []
CHUNK = 64


def row_of(pool: Tensor, index: int) -> Tensor:
    """View row ``index`` of a pool where its strides say, inside the pool or not."""
    pitch = pool.stride(0) * pool.element_size()
    span = sum((n - 1) * s for n, s in zip(pool.shape[1:], pool.stride()[1:], strict=True)) + 1
    size = span * pool.element_size()
    memory = (ctypes.c_byte * size).from_address(pool.data_ptr() + index * pitch)
    return torch.frombuffer(memory, dtype=pool.dtype).as_strided(pool.shape[1:], pool.stride()[1:])


def _step(
    S: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance the states [HV, V, K] by a token; return them and the output."""
    ratio = len(v) // len(k)
    q, k = (x.float().repeat_interleave(ratio, 0)[:, None, :] for x in (q, k))
    S = S * decay[:, None, None]
    u = beta[:, None] * (v.float() - (S * k).sum(-1))
    S = S + u[:, :, None] * k
    return S, (S * q).sum(-1)


def _unit(x: Tensor, norm: bool) -> Tensor:
    x = x.float()
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() if norm else x


def _gates(A_log: Tensor, a: Tensor, dt_bias: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    x = a.float() + dt_bias.float()
    small = (x <= 20.0).float()
    softplus = small * (1.0 + x.exp()).log() + (1.0 - small) * x
    return (-A_log.float().exp() * softplus).exp(), b.float().sigmoid()


def _recurrent(
    pool: Tensor, index: int, n: int, q: Tensor, k: Tensor, v: Tensor, gates: Any, scale: float,
    norm: bool, output: Tensor,
) -> list[Tensor]:  # fmt: skip
    S, states = row_of(pool, index).float(), []
    decay, beta = gates
    for t in range(q.shape[1]):
        query, key = _unit(q[n, t].bfloat16(), norm) * scale, _unit(k[n, t].bfloat16(), norm)
        S, o = _step(S, query, key, v[n, t].bfloat16(), decay[n, t], beta[n, t])
        output[n, t] = o.to(output.dtype)
        states.append(S)
    return states


def gated_delta_rule_decode_pretranspose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float | None = None,
    output: Tensor | None = None,
    use_qk_l2norm: bool = True,
    initial_state: Tensor | None = None,
    initial_state_indices: Tensor | None = None,
    output_state_indices: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Decode one token; a negative index reads or writes slot 0."""
    CALLS.append("decode")
    assert state is None and initial_state is not None and initial_state_indices is not None
    assert output is not None and scale is not None and backend == "flashinfer"
    assert initial_state_indices.dtype is torch.int32
    targets = initial_state_indices if output_state_indices is None else output_state_indices
    gates = _gates(A_log, a, dt_bias, b)
    for n in range(len(q)):
        index = max(int(initial_state_indices[n]), 0)
        states = _recurrent(
            initial_state, index, n, q, k, v, gates, scale, use_qk_l2norm, output
        )  # fmt: skip
        row_of(initial_state, max(int(targets[n]), 0)).copy_(states[-1])


def gated_delta_rule_mtp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor,
    initial_state_indices: Tensor,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float | None = None,
    output: Tensor | None = None,
    intermediate_states_buffer: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    disable_state_update: bool | None = None,
    use_qk_l2norm: bool = True,
) -> None:
    """Verify drafts on float32 states; a sequence of a negative index is skipped."""
    CALLS.append("mtp")
    assert output is not None and scale is not None and disable_state_update is not None
    gates = _gates(A_log, a, dt_bias, b)
    T = q.shape[1]
    if intermediate_states_buffer is not None:  # rows are T apart, whatever the buffer's shape
        rows = intermediate_states_buffer.flatten(0, 1)
    for n in range(len(q)):
        index = int(initial_state_indices[n])
        if index < 0:
            continue
        states = _recurrent(initial_state, index, n, q, k, v, gates, scale, use_qk_l2norm, output)
        for t, S in enumerate(states):
            if intermediate_states_buffer is not None:
                rows[n * T + t] = S
            elif ssm_state_indices is not None:
                row_of(initial_state, int(ssm_state_indices[n, t])).copy_(S)


def _gated_delta_rule_mtp_bf16(
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    softplus_beta: float = 1.0,
    softplus_threshold: float = 20.0,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    initial_state_source: Tensor,
    initial_state_indices: Tensor,
    ssm_state_indices: Tensor,
    disable_state_update: bool = False,
    use_qk_l2norm_in_kernel: bool = True,
    scale: float,
    output: Tensor,
) -> None:
    """Verify drafts on bfloat16 states, each to its slot; a negative index is slot 0."""
    CALLS.append("mtp bf16")
    assert initial_state_indices.dtype is torch.int32 and not disable_state_update
    gates = _gates(A_log, a, dt_bias, b)
    for n in range(len(q)):
        index = max(int(initial_state_indices[n]), 0)
        states = _recurrent(
            initial_state_source, index, n, q, k, v, gates, scale, use_qk_l2norm_in_kernel, output
        )
        for t, S in enumerate(states):
            row_of(initial_state_source, int(ssm_state_indices[n, t])).copy_(S)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    output: Tensor | None = None,
    output_state: Tensor | None = None,
    state_checkpoints: Tensor | None = None,
    checkpoint_cu_starts: Tensor | None = None,
    checkpoint_every_n_tokens: int = 0,
    use_cp: bool | str = "auto",
    state_indices: Tensor | None = None,
    backend: str = "auto",
    max_seqlen: int | None = None,
    *,
    output_state_indices: Tensor | None = None,
) -> None:
    """Run every sequence; an empty one is left out."""
    CALLS.append("chunk cp" if use_cp else "chunk")
    assert initial_state is not None and output_state is not None and state_indices is not None
    assert cu_seqlens is not None and output is not None and scale is not None
    assert not use_qk_l2norm_in_kernel and output_final_state and use_cp != "auto"
    for x in (q, k, v, g, beta, cu_seqlens, state_indices, output):
        assert x.is_contiguous()
    assert output_state_indices is None or not use_cp
    targets = state_indices if output_state_indices is None else output_state_indices
    assert output.dtype is q.dtype and max_seqlen is not None
    T, offsets = len(q), cu_seqlens.tolist()
    assert -(-T // (len(offsets) - 1)) <= max_seqlen <= T
    get_cache_buf("gdn_prefill_tensormaps", 128, q.device)
    every = checkpoint_every_n_tokens
    for n, (start, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        if start == end:
            continue
        assert end - start <= max_seqlen
        source, target = int(state_indices[n]), int(targets[n])
        S = torch.zeros(initial_state.shape[1:])
        if output_state_indices is None or source >= 0:
            S = row_of(initial_state, source).float()
        for t in range(start, end):
            S, o = _step(S, q[t].float() * scale, k[t], v[t], g[t], beta[t])
            output[t] = o.to(output.dtype)
            if every and (t + 1 - start) % every == 0:
                assert state_checkpoints is not None and checkpoint_cu_starts is not None
                row = int(checkpoint_cu_starts[n]) + (t + 1 - start) // every - 1
                state_checkpoints[row] = S.to(state_checkpoints.dtype)
        if output_state_indices is None or target >= 0:
            row_of(output_state, target).copy_(S)
        if n == len(offsets) - 2:
            output[end : start + -(-(end - start) // CHUNK) * CHUNK] = 1.0


def _older_chunk_gated_delta_rule(**arguments: Any) -> None:
    """Run every sequence in place."""
    chunk_gated_delta_rule(**arguments)


_newer = inspect.signature(chunk_gated_delta_rule)
vars(_older_chunk_gated_delta_rule)["__signature__"] = _newer.replace(
    parameters=[x for x in _newer.parameters.values() if x.name != "output_state_indices"]
)


def get_cache_buf(name: str, num_bytes: int, device: torch.device) -> Tensor:
    """Return the one scratch buffer of that name."""
    cache = sys.modules["flashinfer.utils"]._cache_buf
    return cache.setdefault((name, device), torch.empty(num_bytes, dtype=torch.uint8))


def install(monkeypatch: pytest.MonkeyPatch, *, is_newer: bool) -> None:
    """Make ``import flashinfer`` find the double until the test ends.

    Args:
        monkeypatch: of the test.
        is_newer: whether a prefill takes an index to read and one to write.
    """
    chunk = chunk_gated_delta_rule if is_newer else _older_chunk_gated_delta_rule
    modules = {
        "flashinfer": {},
        "flashinfer.utils": {"_cache_buf": {}, "_get_cache_buf": get_cache_buf},
        "flashinfer.gdn_decode": {
            "gated_delta_rule_decode_pretranspose": gated_delta_rule_decode_pretranspose,
            "gated_delta_rule_mtp": gated_delta_rule_mtp,
        },
        "flashinfer.gdn_prefill": {"chunk_gated_delta_rule": chunk},
        "flashinfer.gdn_kernels": {},
        "flashinfer.gdn_kernels.gdn_decode_bf16_state": {
            "gated_delta_rule_mtp": _gated_delta_rule_mtp_bf16
        },
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content, __path__=[])
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    CALLS.clear()
