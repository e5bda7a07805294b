# SPDX-License-Identifier: Apache-2.0
"""The recurrence against Hugging Face transformers' own, in float32."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gdn_portable import GdnSpec, PrefillMetadata, select

pytest.importorskip("transformers")
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)


def _with_repeated_heads(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Give ``rule`` a key head for each value head: older versions leave that to the layer."""

    def run(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        ratio = v.shape[2] // q.shape[2]
        q, k = (x.repeat_interleave(ratio, dim=2) for x in (q, k))
        return rule(q, k, v, *args, **kwargs)

    return run


# without the wrapper that prefers an installed GPU library
torch_chunk = _with_repeated_heads(inspect.unwrap(torch_chunk_gated_delta_rule))
torch_recurrent = _with_repeated_heads(inspect.unwrap(torch_recurrent_gated_delta_rule))

bind = partial(select.bind, check=False)
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)

HEADS = pytest.mark.parametrize(
    ("H", "HV"), [(2, 2), (2, 4), (1, 3), (2, 8), (1, 8)], ids=["1", "2", "3", "4", "8"]
)
HEAD_DIMS = pytest.mark.parametrize(("K", "V"), [(16, 16), (32, 8), (8, 24)])
LENGTHS = (0, 1, 2, 63, 0, 0, 64, 65, 127, 128, 129, 200, 0)


@dataclass(slots=True)
class Inputs:
    """Random packed inputs of T tokens, and a state [slots, HV, V, K] that is not zero."""

    spec: GdnSpec
    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    A_log: Tensor
    dt_bias: Tensor
    state: Tensor

    @property
    def g(self) -> Tensor:
        """Log decay."""
        return -self.A_log.exp() * F.softplus(self.a + self.dt_bias)

    @property
    def beta(self) -> Tensor:
        """Write strength."""
        return self.b.sigmoid()


def _inputs(T: int, slots: int, *, H: int, HV: int, K: int, V: int) -> Inputs:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    return Inputs(
        spec=GdnSpec(
            num_k_heads=H,
            num_v_heads=HV,
            head_k_dim=K,
            head_v_dim=V,
            dtype=torch.float32,
            state_dtype=torch.float32,
        ),
        q=draw(T, H, K),
        k=draw(T, H, K),
        v=draw(T, HV, V),
        a=draw(T, HV),
        b=draw(T, HV),
        A_log=draw(HV),
        dt_bias=draw(HV),
        state=draw(slots, HV, V, K),
    )


def _chunk(x: Inputs, start: int, stop: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run tokens of one sequence as Hugging Face does; its states are [1, HV, K, V]."""
    out, last = torch_chunk(
        *(y[None, start:stop] for y in (x.q, x.k, x.v, x.g, x.beta)),
        initial_state=None if state is None else state.mT[None],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    return out[0], last[0].mT


def _assert_prefill_agrees(x: Inputs, lengths: tuple[int, ...], fresh: Tensor) -> None:
    """Compare a packed prefill, slot i for sequence i, with one call per sequence."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    bounds = list(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True))
    initial = torch.where(fresh[:, None, None, None], 0, x.state)
    pairs = [_chunk(x, *bound, S) for bound, S in zip(bounds, initial, strict=True)]
    metadata = PrefillMetadata(cu_seqlens, torch.arange(len(lengths)), has_initial_state=~fresh)

    out = bind(x.spec, "cpu").chunk_prefill(x.q, x.k, x.v, x.g, x.beta, x.state, metadata=metadata)

    close(out, torch.cat([out for out, _ in pairs]))
    close(x.state, torch.stack([state for _, state in pairs]))


@HEADS
@HEAD_DIMS
def test_packed_prefill_agrees_sequence_by_sequence(H: int, HV: int, K: int, V: int) -> None:
    x = _inputs(sum(LENGTHS), len(LENGTHS), H=H, HV=HV, K=K, V=V)
    fresh = torch.arange(len(LENGTHS)) % 2 == 0

    _assert_prefill_agrees(x, LENGTHS, fresh)


def test_prefill_agrees_at_every_length_from_1_to_200() -> None:
    lengths = tuple(range(1, 201))
    x = _inputs(sum(lengths), len(lengths), H=1, HV=2, K=16, V=8)

    _assert_prefill_agrees(x, lengths, torch.ones(len(lengths), dtype=torch.bool))


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_prefill_of_one_sequence_agrees(length: int) -> None:
    x = _inputs(length, 1, H=2, HV=4, K=16, V=8)

    _assert_prefill_agrees(x, (length,), torch.tensor([True]))


@HEADS
@HEAD_DIMS
def test_decode_step_by_step_agrees(H: int, HV: int, K: int, V: int) -> None:
    B, steps = 3, 5
    x = _inputs(B * steps, B, H=H, HV=HV, K=K, V=V)
    steps_of = partial(torch.unflatten, dim=0, sizes=(B, steps))
    q, k, v, a, b, g, beta = map(steps_of, (x.q, x.k, x.v, x.a, x.b, x.g, x.beta))
    expected, last = torch_recurrent(
        q,
        k,
        v,
        g=g,
        beta=beta,
        initial_state=x.state.mT,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    ops, slots = bind(x.spec, "cpu"), torch.arange(B)

    outputs = [
        ops.recurrent_decode(
            q[:, t],
            k[:, t],
            v[:, t],
            a[:, t],
            b[:, t],
            x.A_log,
            x.dt_bias,
            x.state,
            state_indices=slots,
        )
        for t in range(steps)
    ]

    close(torch.stack(outputs, dim=1), expected)
    close(x.state, last.mT)


@HEADS
def test_decode_from_an_empty_state_agrees(H: int, HV: int) -> None:
    x = _inputs(4, 4, H=H, HV=HV, K=16, V=8)
    x.state.zero_()
    expected, last = torch_recurrent(
        *(y[:, None] for y in (x.q, x.k, x.v, x.g, x.beta)),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )

    out = bind(x.spec, "cpu").recurrent_decode(
        x.q, x.k, x.v, x.a, x.b, x.A_log, x.dt_bias, x.state, state_indices=torch.arange(4)
    )

    close(out, expected[:, 0])
    close(x.state, last.mT)


def test_gating_agrees_with_the_formula_of_the_layers() -> None:
    x = _inputs(64, 1, H=2, HV=4, K=16, V=8)

    g, beta = bind(x.spec, "cpu").gating(x.a, x.b, x.A_log, x.dt_bias)

    close(g, x.g)
    close(beta, x.beta)


def test_keys_that_are_not_normalised_agree_too() -> None:
    x = _inputs(70, 1, H=2, HV=4, K=16, V=8)
    x.k.mul_(0.1)
    spec = GdnSpec(
        num_k_heads=2,
        num_v_heads=4,
        head_k_dim=16,
        head_v_dim=8,
        dtype=torch.float32,
        state_dtype=torch.float32,
        qk_l2norm=False,
    )
    expected, last = torch_chunk(
        *(y[None] for y in (x.q, x.k, x.v, x.g, x.beta)), output_final_state=True
    )
    metadata = PrefillMetadata(torch.tensor([0, 70]), torch.tensor([0]), torch.tensor([False]))

    out = bind(spec, "cpu").chunk_prefill(x.q, x.k, x.v, x.g, x.beta, x.state, metadata=metadata)

    close(out, expected[0])
    close(x.state, last.mT)
