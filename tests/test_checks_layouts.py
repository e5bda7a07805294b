# SPDX-License-Identifier: Apache-2.0
"""Pools in another layout than the spec declares: told by shape, or by strides where square."""

from __future__ import annotations

import dataclasses

import pytest

from gdn_portable import ConvLayout, StateLayout
from gdn_portable.checks.tensors import shape_text
from tests.calls import CASES, COMMITS, SPEC, call_of, leaves, refusal, replaced

STEPS = tuple(case for case in CASES if "_step" in case)


@pytest.mark.parametrize("name", ["conv_state", "state"])
@pytest.mark.parametrize("case", [*STEPS, *COMMITS])
def test_a_pool_in_the_other_layout_is_refused(case: str, name: str) -> None:
    call = call_of(case)
    turned = leaves(call)[f"pool__{name}"].transpose(-1, -2).contiguous()

    message = refusal(case, replaced(call, **{f"pool__{name}": turned}))

    assert f"{name} has shape {shape_text(turned.shape)}, needs (slots, " in message
    assert "in the layouts DIM_FIRST and VK" in message


@pytest.mark.parametrize("case", ["chunk_prefill", "recurrent_decode", "mtp_verify table"])
@pytest.mark.parametrize(("layout", "axis"), [(StateLayout.VK, "K"), (StateLayout.KV, "V")])
def test_a_square_state_in_the_other_layout_is_told_by_its_strides(
    case: str, layout: StateLayout, axis: str
) -> None:
    square = dataclasses.replace(SPEC, head_v_dim=8, state_layout=layout)
    call = call_of(case, square)
    turned = call["state"].transpose(-1, -2)

    message = refusal(case, replaced(call, state=turned), square)

    assert f"state has strides {turned.stride()}, needs {axis} contiguous" in message
    assert "declare the layout in the spec" in message


def test_a_window_of_the_other_layout_is_told_by_its_channels() -> None:
    spec = dataclasses.replace(SPEC, conv_layout=ConvLayout.LEN_FIRST)
    call = call_of("conv1d_update", SPEC)

    message = refusal("conv1d_update", call, spec)

    assert "conv_state has shape (8, 56, 5), needs (slots, 5, 56)" in message
    assert "LEN_FIRST" in message
