# SPDX-License-Identifier: Apache-2.0
"""What SGLang's signatures say beyond the ops behind them: defaults, windows, plans, tracking."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_portable import GdnOps, GdnSpec, PrefillMetadata, bind
from gdn_portable.engines.sglang import GdnKernel, causal_conv1d_fn, causal_conv1d_update
from gdn_portable.engines.sglang.kernel import SharedPrefill
from tests.cases import bits, generator, nan, random
from tests.sglang_arguments import HV, B, D, K, P, V, W, conv_fn, conv_update, extend, packed_decode


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(bits(one.contiguous()), bits(other.contiguous()))


def test_without_flags_no_window_is_read() -> None:
    flagged = {**conv_fn(), "has_initial_state": torch.tensor([False, False])}
    unread = conv_fn()
    unread["conv_states"].fill_(float("nan"))

    assert _same(causal_conv1d_fn(**unread), causal_conv1d_fn(**flagged))
    assert _same(unread["conv_states"][[3, 1]], flagged["conv_states"][[3, 1]])
    assert unread["conv_states"][[0, 2, 4]].isnan().all()


def test_without_indices_slots_are_those_of_the_batch_in_order() -> None:
    counted, named = ({**conv_fn(), "has_initial_state": torch.ones(2).bool()} for _ in range(2))
    counted["cache_indices"] = None
    named["cache_indices"] = torch.tensor([0, 1])

    assert _same(causal_conv1d_fn(**counted), causal_conv1d_fn(**named))
    assert _same(counted["conv_states"], named["conv_states"])


@pytest.mark.parametrize(("pad_slot_id", "is_padding"), [(-1, False), (None, False), (0, True)])
def test_the_slot_that_means_padding_is_the_callers(
    pad_slot_id: int | None, is_padding: bool
) -> None:
    call = {**conv_update(), "conv_state_indices": torch.tensor([0, 2]), "pad_slot_id": pad_slot_id}
    before = call["conv_state"].clone()

    y = causal_conv1d_update(**call)

    assert y[0].any().item() is not is_padding
    assert _same(call["conv_state"][0], before[0]) is is_padding
    assert not _same(call["conv_state"][2], before[2])


def test_a_packed_decode_keeps_in_the_ring_what_it_does_not_write() -> None:
    kernel, L = GdnKernel(bind), 3
    plain, ringed = packed_decode(), packed_decode()
    slots = ringed["ssm_states"].shape[0]
    H = (D - HV * V) // (2 * K)
    ring = {"d": nan(slots, HV, L, V), "k": nan(slots, H, L, K), "g": nan(slots, HV, L)}
    ringed |= {f"replayssm_{name}": part.float() for name, part in ring.items()}
    for step in range(2 * L):
        position = torch.tensor([step % L, step % L], dtype=torch.int32)
        flush = torch.tensor([step == 3, False], dtype=torch.int32)
        if step > 3:
            position[0] = (step - 4) % L
        before = ringed["ssm_states"].clone()

        want = kernel.packed_decode(**plain)
        got = kernel.packed_decode(
            **ringed, replayssm_write_pos=position, replayssm_force_flush=flush
        )

        torch.testing.assert_close(got, want)
        writes = (position == L - 1) | flush.bool()
        for slot, written in zip(plain["cache_indices"].tolist(), writes.tolist(), strict=True):
            expected = plain if written else {"ssm_states": before}
            torch.testing.assert_close(ringed["ssm_states"][slot], expected["ssm_states"][slot])
    assert ringed["replayssm_d"][:, :, L - 1].isnan().all()


@pytest.mark.parametrize("activation", [True, "swish", "silu", None, False])
def test_tokens_at_once_are_tokens_in_turn(activation: bool | str | None) -> None:
    once, turn = ({**conv_update(), "activation": activation} for _ in range(2))
    x = turn.pop("x")

    y = causal_conv1d_update(**once)

    each = [causal_conv1d_update(x[..., t], **turn) for t in range(P)]
    torch.testing.assert_close(y, torch.stack(each, dim=-1))
    assert _same(once["conv_state"], turn["conv_state"])


def test_windows_of_a_chain_may_overlap_in_memory() -> None:
    shared = nan(B, D, W - 1 + P - 1, dtype=torch.float32)
    overlapping = shared.as_strided((B, P, D, W - 1), (shared.stride(0), 1, shared.stride(1), 1))
    apart = nan(B, P, D, W - 1, dtype=torch.float32)
    call = conv_update()
    before = call["conv_state"].clone()

    one = causal_conv1d_update(**call, intermediate_conv_window=overlapping)
    other = causal_conv1d_update(**call, intermediate_conv_window=apart)

    assert _same(one, other)
    assert _same(overlapping, apart)
    assert _same(call["conv_state"], before)


def test_states_are_left_alone_where_nothing_is_to_be_stored() -> None:
    stored, scored = extend(), extend()
    scored["cache_indices"] = torch.tensor([3, 3])
    before = scored["ssm_states"].clone()

    o = GdnKernel(bind).extend(**scored, inplace_update=False)[0]

    want = GdnKernel(bind).extend(**stored)[0]
    assert _same(o[:, :2], want[:, :2])
    assert _same(scored["ssm_states"], before)
    assert not _same(stored["ssm_states"], before)


def test_the_state_after_a_chunk_is_tracked_in_float32() -> None:
    rng, lengths = generator(), (130, 64)
    q, k = (random(rng, 1, 194, 1, 16, dtype=torch.bfloat16) for _ in range(2))
    v = random(rng, 1, 194, 2, 16, dtype=torch.bfloat16)
    g, beta = -random(rng, 1, 194, 2).abs().float(), random(rng, 1, 194, 2).sigmoid().float()
    tracked = nan(2, 2, 16, 16, dtype=torch.float32)

    def run(tokens: Tensor, lengths: tuple[int, ...], **more: Any) -> Tensor:
        states = torch.zeros(3, 2, 16, 16, dtype=torch.bfloat16)
        GdnKernel(bind).extend(
            *(x[:, tokens] for x in (q, k, v, g, beta)),
            ssm_states=states,
            cache_indices=torch.tensor([1, 2]),
            query_start_loc=torch.tensor([0, *lengths]).cumsum(0),
            **more,
        )
        return states

    run(torch.arange(194), lengths, track_state=tracked, track_chunk_idx=torch.tensor([2, -1]))

    after = run(torch.cat([torch.arange(128), torch.arange(130, 194)]), (128, 64))
    assert _same(tracked[0].bfloat16(), after[1])
    assert tracked[1].isnan().all()


def test_the_layers_of_a_step_share_one_plan() -> None:
    planned: list[PrefillMetadata] = []

    def counting(spec: GdnSpec, device: object, *, deterministic: bool = False) -> GdnOps:
        return dataclasses.replace(bind(spec, device), plan_prefill=planned.append)

    kernel, call = GdnKernel(counting), extend()
    step = PrefillMetadata(call["query_start_loc"], call["cache_indices"])
    kernel.begin_prefill(SharedPrefill(step))

    for _ in range(3):
        kernel.extend(**call)
    assert planned == [step]

    kernel.extend(**{**call, "query_start_loc": call["query_start_loc"].clone()})
    kernel.extend(**call, inplace_update=False)
    assert planned[0] is step and step not in planned[1:] and len(planned) == 3


@pytest.mark.parametrize("scale", [K**-0.5, 0.2])
def test_a_packed_decode_takes_the_scale_it_is_given(scale: float) -> None:
    call = packed_decode()
    spec = GdnSpec(2, HV, K, V, torch.float32, torch.float32, scale=scale)
    state = call["ssm_states"].clone()
    q, k, v = call["mixed_qkv"].split(spec.conv_groups, dim=-1)

    o = GdnKernel(bind).packed_decode(**{**call, "scale": scale})

    want = bind(spec, "cpu").recurrent_decode(
        q.unflatten(-1, (2, K)),
        k.unflatten(-1, (2, K)),
        v.unflatten(-1, (HV, V)),
        *(call[name] for name in ("a", "b", "A_log", "dt_bias")),
        state,
        state_indices=call["cache_indices"],
    )
    assert _same(o[0], want)
    assert _same(call["ssm_states"], state)
