# SPDX-License-Identifier: Apache-2.0
"""SGLang's own Triton kernels give the same, called alike: on a GPU, or on a simulated one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import triton
from packaging.version import Version
from sglang.kernels.ops.attention.linear import fused_gdn_gating
from sglang.kernels.ops.mamba import causal_conv1d_triton
from sglang.srt.layers.attention.linear.kernels.gdn_triton import TritonGDNKernel
from sglang.test.kits.attention_unittest.attention_methods.gdn_attention import GDN_ATOL, GDN_RTOL
from torch import Tensor

from gdn_portable import bind
from gdn_portable.engines.sglang import GdnKernel
from gdn_portable.engines.sglang.bound import Bind
from gdn_portable.engines.sglang.functions import make_functions
from tests.engine_sglang.layer import DEVICE
from tests.sglang_calls import simulated

H, HV, K, V, W, P = 1, 2, 32, 32, 4, 3
D = 2 * H * K + HV * V
CU_SEQLENS = (0, 1, 6, 9)
SLOTS = (3, 5, 0)

Call = Callable[[Any, Any], tuple[Tensor, ...]]


class Inputs:
    """What a call takes; two of them with the same numbers."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(2)
        T, slots = CU_SEQLENS[-1], 7
        self.mixed = self.normal(T, D)
        self.a, self.b = self.normal(T, HV), self.normal(T, HV)
        self.weight, self.bias = self.normal(D, W) * 0.5, self.normal(D)
        self.A_log, self.dt_bias = self.normal(HV).float(), self.normal(HV)
        self.windows = self.normal(slots, D, W - 1)
        self.states = self.normal(slots, HV, V, K).float() * 0.1
        self.slots, self.cu_seqlens = self.index(*SLOTS), self.index(*CU_SEQLENS)
        self.uniform = self.index(*range(0, T + 1, P))
        self.kept_windows = torch.zeros(4, P, D, W - 1, dtype=torch.bfloat16, device=DEVICE)
        self.kept_states = torch.zeros(4, P, HV, V, K, device=DEVICE)
        self.rows = self.index(2, 0, 1)
        self.next_token = self.index(1, -1, -1).repeat(3, 1)
        self.next_sibling = self.index(-1, 2, -1).repeat(3, 1)
        self.parents = torch.zeros_like(self.next_token)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).bfloat16().to(DEVICE)

    def index(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    def qkv(self, rows: int = CU_SEQLENS[-1]) -> tuple[Tensor, ...]:
        q, k, v = self.mixed[:rows].split((H * K, H * K, HV * V), dim=-1)
        return (
            q.contiguous().view(1, rows, H, K),
            k.contiguous().view(1, rows, H, K),
            v.contiguous().view(1, rows, HV, V),
        )


def conv_of_a_prefill(functions: Any, kernel: Any) -> tuple[Tensor, ...]:
    x = Inputs()
    y = functions.causal_conv1d_fn(
        x.mixed.transpose(0, 1),
        x.weight,
        x.bias,
        activation="silu",
        conv_states=x.windows,
        has_initial_state=torch.tensor([True, False, True], device=DEVICE),
        cache_indices=x.slots,
        query_start_loc=x.cu_seqlens,
        seq_lens_cpu=[1, 5, 3],
    )
    return y.transpose(0, 1)[: len(x.mixed)], x.windows


def conv_of_a_decode(functions: Any, kernel: Any) -> tuple[Tensor, ...]:
    x = Inputs()
    y = functions.causal_conv1d_update(
        x.mixed[:3], x.windows, x.weight, x.bias, "silu", conv_state_indices=x.slots
    )
    return y, x.windows


def conv_of_several_tokens(functions: Any, kernel: Any) -> tuple[Tensor, ...]:
    x = Inputs()
    tokens = x.mixed.unflatten(0, (3, P)).transpose(1, 2)
    y = functions.causal_conv1d_update(
        tokens, x.windows, x.weight, None, True, conv_state_indices=x.slots
    )
    return y, x.windows


def conv_of_a_chain(functions: Any, kernel: Any) -> tuple[Tensor, ...]:
    x = Inputs()
    y = functions.causal_conv1d_update(
        x.mixed.unflatten(0, (3, P)).transpose(1, 2),
        x.windows,
        x.weight,
        x.bias,
        None,
        conv_state_indices=x.slots,
        intermediate_conv_window=x.kept_windows,
        intermediate_state_indices=x.rows,
    )
    return y, x.kept_windows


def conv_of_a_tree(functions: Any, kernel: Any) -> tuple[Tensor, ...]:
    x = Inputs()
    y = functions.causal_conv1d_update(
        x.mixed.unflatten(0, (3, P)).transpose(1, 2),
        x.windows,
        x.weight,
        x.bias,
        "silu",
        conv_state_indices=x.slots,
        intermediate_conv_window=x.kept_windows,
        intermediate_state_indices=x.rows,
        retrieve_next_token=x.next_token,
        retrieve_next_sibling=x.next_sibling,
        retrieve_parent_token=x.parents,
    )
    return y, x.kept_windows, x.parents[:, 1:]


def gating(functions: Any, kernel: Any) -> tuple[Tensor, ...]:
    x = Inputs()
    return functions.fused_gdn_gating(x.A_log, x.a, x.b, x.dt_bias)


def packed_decode(functions: Any, kernel: Any) -> tuple[Tensor, ...]:
    x = Inputs()
    o = kernel.packed_decode(
        mixed_qkv=x.mixed[:3],
        a=x.a[:3],
        b=x.b[:3],
        A_log=x.A_log,
        dt_bias=x.dt_bias,
        scale=0.25,
        ssm_states=x.states,
        cache_indices=x.slots,
        num_v_heads=HV,
        head_v_dim=V,
    )
    return o, x.states


def decode(functions: Any, kernel: Any) -> tuple[Tensor, ...]:
    x = Inputs()
    o = kernel.decode(
        *x.qkv(3),
        x.a[:3],
        x.b[:3],
        A_log=x.A_log,
        dt_bias=x.dt_bias,
        ssm_states=x.states,
        cache_indices=x.slots,
        query_start_loc=x.index(0, 1, 2, 3),
    )
    return o, x.states


def extend(functions: Any, kernel: Any) -> tuple[Tensor, ...]:
    x = Inputs()
    g, beta = make_functions(bind).fused_gdn_gating(
        *(t.cpu() for t in (x.A_log, x.a, x.b, x.dt_bias))
    )
    o = kernel.extend(
        *x.qkv(),
        g.to(DEVICE),
        beta.to(DEVICE),
        ssm_states=x.states,
        cache_indices=x.slots,
        query_start_loc=x.cu_seqlens,
    )[0]
    return o, x.states


def _verify(kernel: Any, parents: bool) -> tuple[Tensor, ...]:
    x = Inputs()
    o = kernel.target_verify(
        x.A_log,
        x.dt_bias,
        *x.qkv(),
        x.a,
        x.b,
        ssm_states=x.states,
        cache_indices=x.slots,
        query_start_loc=x.uniform,
        intermediate_states_buffer=x.kept_states,
        intermediate_state_indices=x.rows,
        cache_steps=P,
        retrieve_parent_token=x.parents if parents else None,
    )
    return o, x.states, x.kept_states


def verify_of_a_chain(functions: Any, kernel: Any) -> tuple[Tensor, ...]:
    return _verify(kernel, parents=False)


def verify_of_a_tree(functions: Any, kernel: Any) -> tuple[Tensor, ...]:
    return _verify(kernel, parents=True)


CALLS = (
    conv_of_a_prefill,
    conv_of_a_decode,
    conv_of_several_tokens,
    conv_of_a_chain,
    conv_of_a_tree,
    gating,
    packed_decode,
    decode,
    pytest.param(
        extend,
        marks=pytest.mark.skipif(
            Version(triton.__version__) >= Version("3.9"),
            reason="SGLang's chunks need block pointers, which Triton has until 3.8",
        ),
    ),
    verify_of_a_chain,
    verify_of_a_tree,
)


class Theirs:
    causal_conv1d_fn = staticmethod(causal_conv1d_triton.causal_conv1d_fn)
    causal_conv1d_update = staticmethod(causal_conv1d_triton.causal_conv1d_update)
    fused_gdn_gating = staticmethod(fused_gdn_gating.fused_gdn_gating)


@pytest.fixture
def used(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Bind:
    """Return what binds for the GPU that is here, or else for a simulated one."""
    if DEVICE == "cuda":
        return bind
    request.getfixturevalue("amd_gpu")
    # SGLang enters the device of its tensors, which torch has for no CPU
    monkeypatch.setattr(torch.cpu, "device", nullcontext, raising=False)
    return simulated


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_a_call_gives_what_sglangs_kernel_gives(used: Bind, call: Call) -> None:
    ours = call(make_functions(used), GdnKernel(used))
    theirs = call(Theirs, TritonGDNKernel())

    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, atol=GDN_ATOL, rtol=GDN_RTOL)
