# SPDX-License-Identifier: Apache-2.0
"""What SGLang's signatures allow and the library cannot do is refused before a state changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gdn_portable import InputError, UnsupportedCallError, bind
from gdn_portable.engines.sglang import (
    GdnKernel,
    causal_conv1d_fn,
    causal_conv1d_update,
    fused_gdn_gating,
)
from tests.cases import bits
from tests.sglang_arguments import (
    HV,
    B,
    Call,
    D,
    H,
    K,
    P,
    V,
    W,
    conv_fn,
    conv_update,
    decode,
    extend,
    floats,
    gating,
    index,
    packed_decode,
    target_verify,
)

KERNEL = GdnKernel(bind)
RUN: dict[Callable[[], Call], Callable[..., object]] = {
    decode: KERNEL.decode,
    packed_decode: KERNEL.packed_decode,
    extend: KERNEL.extend,
    target_verify: KERNEL.target_verify,
    conv_fn: causal_conv1d_fn,
    conv_update: causal_conv1d_update,
    gating: fused_gdn_gating,
}
TURNED = floats(5, HV, V, K).transpose(2, 3)
LINKS = torch.full((B, P), -1, dtype=torch.int32)
REFUSED = (
    (decode, {"query_start_loc": index(0, 2)}, InputError, "names 1 sequences, needs 2"),
    (decode, {"ssm_states": TURNED}, InputError, r"slots of \(4, 8, 6\), needs \(4, 6, 8\)"),
    (decode, {"q": floats(2, 1, H, K)}, InputError, "names 2 sequences, needs 1"),
    (packed_decode, {"replayssm_d": floats(1)}, InputError, "part of a ReplaySSM ring is None"),
    (packed_decode, {"replayssm_write_pos": index(1)}, InputError, "part of a ReplaySSM ring"),
    (packed_decode, {"num_v_heads": 2, "head_v_dim": 12}, InputError, "needs"),
    (extend, {"ssm_states": TURNED}, InputError, r"needs \(4, 6, 8\) \[HV, V, K\]"),
    (extend, {"num_state_checkpoints": 2}, UnsupportedCallError, "needs track_state"),
    (extend, {"track_state": floats(B, HV, V, K)}, InputError, "needs both or neither"),
    (extend, {"track_chunk_idx": index(0, 0)}, InputError, "needs both or neither"),
    (extend, {"beta": floats(5, HV)}, InputError, "beta has shape"),
    (target_verify, {"ssm_states": TURNED}, InputError, "intermediate_states_buffer is"),
    (
        target_verify,
        {"intermediate_states_buffer": floats(B, P - 1, HV, V, K)},
        InputError,
        r"needs \(rows, 3, 4, 6, 8\)",
    ),
    (
        target_verify,
        {"intermediate_states_buffer": floats(B, P, HV, V, K).bfloat16()},
        InputError,
        "of torch.bfloat16, needs .* of torch.float32",
    ),
    (conv_fn, {"conv_states": None}, InputError, "conv_states is None, needs a tensor"),
    (conv_fn, {"query_start_loc": None}, InputError, "query_start_loc is None"),
    (conv_fn, {"pad_slot_id": 3}, InputError, "pad_slot_id is 3, needs -1, 0 or None"),
    (conv_fn, {"activation": "gelu"}, InputError, "activation is 'gelu', needs 'silu'"),
    (conv_fn, {"x": floats(5, D)}, InputError, "a row has 5 channels"),
    (conv_fn, {"weight": floats(D, 6)}, InputError, r"needs 56 and \(56, 5\) \[D, L\]"),
    (conv_update, {"cache_seqlens": index(1, 1)}, UnsupportedCallError, "windows are no ring"),
    (conv_update, {"num_accept_tokens": index(1, 1)}, UnsupportedCallError, "SGLang commits"),
    (conv_update, {"metadata": object()}, UnsupportedCallError, "metadata is given"),
    (conv_update, {"retrieve_next_token": LINKS}, InputError, "needs both or neither"),
    (
        conv_update,
        {"retrieve_next_token": LINKS, "retrieve_next_sibling": LINKS},
        InputError,
        "needs intermediate_conv_window and retrieve_parent_token",
    ),
    (
        conv_update,
        {"intermediate_conv_window": floats(B, P, W - 1, D)},
        InputError,
        r"needs \[rows, 3, 56, 3\]",
    ),
    (
        conv_update,
        {"x": floats(B, D), "intermediate_conv_window": floats(B, P, D, W - 1)},
        InputError,
        r"needs x \[B, D, P\], got \[B, D\]",
    ),
    (gating, {"threshold": 10.0}, UnsupportedCallError, "needs 1 and 20"),
)


def _name(value: object) -> str | None:
    return value.__name__ if callable(value) else None


@pytest.mark.parametrize(("call", "change", "error", "message"), REFUSED, ids=_name)
def test_a_call_that_cannot_be_served_is_refused(
    call: Callable[[], Call], change: Call, error: type[Exception], message: str
) -> None:
    arguments = {**call(), **change}
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    before = {name: x.clone() for name, x in tensors.items()}

    with pytest.raises(error, match=message):
        RUN[call](**arguments)

    for name, x in tensors.items():
        assert torch.equal(bits(x), bits(before[name])), name


@pytest.mark.parametrize("call", RUN, ids=_name)
def test_a_keyword_that_nobody_knows_is_refused(call: Callable[[], Call]) -> None:
    with pytest.raises(TypeError, match="novelty"):
        RUN[call](**call(), novelty=1)


@pytest.mark.parametrize("call", RUN, ids=_name)
def test_the_call_as_it_is_passes(call: Callable[[], Call]) -> None:
    result = RUN[call](**call())

    outputs = result if isinstance(result, tuple) else (result,)
    assert not any(x.isnan().any() for x in outputs if x is not None)
