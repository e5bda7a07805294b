# SPDX-License-Identifier: Apache-2.0
"""What a spec accepts, and how it is cut for tensor parallelism."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_portable import (
    ConvLayout,
    GdnParams,
    GdnSpec,
    PrefillMetadata,
    SpecError,
    StateLayout,
    StatePool,
    select,
)

bind = partial(select.bind, check=False)

VALID: dict[str, Any] = {
    "num_k_heads": 4,
    "num_v_heads": 8,
    "head_k_dim": 16,
    "head_v_dim": 8,
    "dtype": torch.float32,
    "state_dtype": torch.float32,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_k_heads": 0}, "num_k_heads is 0, needs an integer of at least 1"),
        ({"num_v_heads": -8}, "num_v_heads is -8, needs an integer of at least 1"),
        ({"head_k_dim": 1.5}, "head_k_dim is 1.5, needs an integer of at least 1"),
        ({"head_v_dim": None}, "head_v_dim is None, needs an integer of at least 1"),
        ({"num_v_heads": 6}, "num_v_heads is 6, needs a multiple of num_k_heads (4)"),
        ({"conv_width": 1}, "conv_width is 1, needs an integer of at least 2"),
        ({"conv_window": 2}, "conv_window is 2, needs at least conv_width - 1 (3)"),
        ({"dtype": torch.int32}, "dtype is torch.int32, needs a floating torch.dtype"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16', needs a floating torch.dtype"),
        ({"state_dtype": None}, "state_dtype is None, needs a floating torch.dtype"),
        (
            {"conv_dtype": torch.int8},
            "conv_state_dtype is torch.int8, needs a floating torch.dtype",
        ),
        ({"activation": "gelu"}, "activation is 'gelu', needs 'silu' or None"),
        ({"gate_activation": None}, "gate_activation is None, needs 'silu' or 'sigmoid'"),
        ({"conv_layout": "D_FIRST"}, "conv_layout is 'D_FIRST', needs 'DIM_FIRST' or 'LEN_FIRST'"),
        ({"state_layout": "KK"}, "state_layout is 'KK', needs 'VK' or 'KV'"),
        ({"scale": "0.125"}, "scale is '0.125', needs a finite number or None"),
        ({"scale": float("nan")}, "scale is nan, needs a finite number or None"),
        ({"qk_l2norm": "false"}, "qk_l2norm is 'false', needs True or False"),
        ({"pad_slot": -2}, "pad_slot is -2, needs an integer of at least -1"),
        ({"scratch_slot": -1}, "scratch_slot is -1, needs an integer of at least 0"),
    ],
)
def test_a_wrong_field_is_reported_with_what_it_needs(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(SpecError) as caught:
        GdnSpec(**(VALID | changes))

    assert str(caught.value) == message


def test_a_spec_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="num_k_heads"):
        GdnSpec(**(VALID | {"num_k_heads": 0}))


def test_layouts_may_be_named_by_their_strings() -> None:
    spec = GdnSpec(**(VALID | {"state_layout": "KV", "conv_layout": "LEN_FIRST"}))

    assert spec.state_layout is StateLayout.KV
    assert spec.conv_layout is ConvLayout.LEN_FIRST


def test_fields_left_out_follow_from_the_others() -> None:
    spec = GdnSpec(**(VALID | {"dtype": torch.bfloat16}))

    assert spec.conv_state_len == 3
    assert spec.conv_state_dtype is torch.bfloat16
    assert spec.q_scale == 16**-0.5
    assert spec.compute_dtype is torch.float32


def test_a_spec_can_be_a_dictionary_key_and_does_not_change() -> None:
    spec, same = GdnSpec(**VALID), GdnSpec(**VALID)

    assert {spec: "found"}[same] == "found"
    with pytest.raises(FrozenInstanceError):
        spec.num_k_heads = 2  # type: ignore[misc]


def test_conv_groups_are_the_channels_of_q_k_and_v() -> None:
    spec = GdnSpec(**VALID)

    assert spec.conv_groups == (64, 64, 64)
    assert replace(spec, head_v_dim=32).conv_groups == (64, 64, 256)
    assert replace(spec, head_v_dim=32).conv_dim == 384


def test_shard_divides_the_heads_and_keeps_the_rest() -> None:
    spec = GdnSpec(**VALID, scale=0.5, pad_slot=0, state_layout=StateLayout.KV)

    assert spec.shard(4) == replace(spec, num_k_heads=1, num_v_heads=2)
    assert spec.shard(1) == spec


@pytest.mark.parametrize("tp_size", [0, -1, 3, 8])
def test_shard_refuses_ranks_that_do_not_divide_both_head_counts(tp_size: int) -> None:
    with pytest.raises(SpecError) as caught:
        GdnSpec(**VALID).shard(tp_size)

    assert str(caught.value) == (
        f"tp_size is {tp_size}, needs a divisor of num_k_heads (4) and of num_v_heads (8)"
    )


def _group_of_rank(x: Tensor, spec: GdnSpec, tp_size: int, rank: int, dim: int) -> Tensor:
    """Cut channels [q | k | v] for one rank, each group on its own."""
    groups = x.split(spec.conv_groups, dim=dim)
    return torch.cat([group.chunk(tp_size, dim=dim)[rank] for group in groups], dim=dim)


def _params_of_rank(params: GdnParams, spec: GdnSpec, tp_size: int, rank: int) -> GdnParams:
    assert params.conv_bias is not None
    return GdnParams(
        conv_weight=_group_of_rank(params.conv_weight, spec, tp_size, rank, dim=0),
        conv_bias=_group_of_rank(params.conv_bias, spec, tp_size, rank, dim=0),
        A_log=params.A_log.chunk(tp_size)[rank],
        dt_bias=params.dt_bias.chunk(tp_size)[rank],
        norm_weight=params.norm_weight,
    )


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("head_v_dim", [8, 24])
def test_outputs_and_states_of_all_ranks_concatenate_to_the_unsharded_layer(
    tp_size: int, head_v_dim: int
) -> None:
    torch.manual_seed(0)
    spec = GdnSpec(**(VALID | {"head_v_dim": head_v_dim}))
    params = GdnParams(
        conv_weight=torch.randn(spec.conv_dim, spec.conv_width),
        conv_bias=torch.randn(spec.conv_dim),
        A_log=torch.randn(spec.num_v_heads),
        dt_bias=torch.randn(spec.num_v_heads),
        norm_weight=torch.randn(spec.head_v_dim),
    )
    tokens, slots = torch.tensor([0, 5, 75]), torch.tensor([2, 0])
    whole = _prefill_then_decode(spec, params, tokens, slots, tp_size=1, rank=0)

    ranks = [
        _prefill_then_decode(spec, params, tokens, slots, tp_size=tp_size, rank=rank)
        for rank in range(tp_size)
    ]

    for whole_part, parts in zip(
        whole[:3], zip(*(rank[:3] for rank in ranks), strict=True), strict=True
    ):
        torch.testing.assert_close(torch.cat(parts, dim=1), whole_part)
    for rank, (*_, conv_state) in enumerate(ranks):
        expected = _group_of_rank(whole[3], spec, tp_size, rank, dim=1)
        torch.testing.assert_close(conv_state, expected)


def _prefill_then_decode(
    spec: GdnSpec,
    params: GdnParams,
    cu_seqlens: Tensor,
    slots: Tensor,
    *,
    tp_size: int,
    rank: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return one rank's prefill output, decode output, state and conv state."""
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator)
    shard = spec.shard(tp_size)
    ops, pool = bind(shard, "cpu"), StatePool.allocate(shard, 3, "cpu")
    own = _params_of_rank(params, spec, tp_size, rank)
    metadata = PrefillMetadata(cu_seqlens=cu_seqlens, state_indices=slots)
    outputs = []
    for count, step, where in (
        (int(cu_seqlens[-1]), ops.prefill_step, {"metadata": metadata}),
        (len(slots), ops.decode_step, {"state_indices": slots}),
    ):
        mixed_qkv = _group_of_rank(draw(count, spec.conv_dim), spec, tp_size, rank, dim=1)
        a, b, gate = (
            draw(count, spec.num_v_heads, *tail).chunk(tp_size, dim=1)[rank]
            for tail in ((), (), (spec.head_v_dim,))
        )
        outputs.append(step(mixed_qkv, a, b, own, pool, gate=gate, **where))
    assert pool.state is not None and pool.conv_state is not None
    return outputs[0], outputs[1], pool.state, pool.conv_state
