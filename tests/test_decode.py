# SPDX-License-Identifier: Apache-2.0
"""gating, recurrent_decode, gated_rms_norm and decode_step against the oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gdn_portable import PrefillMetadata, StateLayout, write_deferred
from tests.cases import (
    F64,
    FLOAT32,
    SPEC,
    ab,
    assert_close,
    check,
    copies,
    cpu,
    decays,
    deferred_updates,
    gate,
    generator,
    index_forms,
    mixed_qkv,
    nan,
    offsets,
    packed,
    params,
    pool,
    qkv,
    random,
    slots,
    state_pool,
    tensors,
)

both_layouts = pytest.mark.parametrize("state_layout", list(StateLayout))
paddings = pytest.mark.parametrize(
    "pad_slot, indices", [(-1, (4, -1, 1, -2)), (0, (4, 0, 1, -1)), (-1, (-1, 0, -2, 4))]
)


def test_gating_at_the_edges_of_softplus():
    a = torch.tensor([19.9, 20.0, 20.1, -90.0, 96.0, 0.0, 20.0 + 1e-9], dtype=F64)
    b = torch.tensor([-90.0, 96.0, 0.0, 1.0, 19.9, 20.1, -20.0], dtype=F64)
    A_log, dt_bias = torch.linspace(-2, 1, 4, dtype=F64), torch.zeros(4, dtype=F64)

    check(SPEC, "gating", a[:, None].repeat(1, 4), b[:, None].repeat(1, 4), A_log, dt_bias)


def test_gating_adds_the_bias_before_softplus():
    a = torch.full((3, 4), 10.0, dtype=F64)
    dt_bias = torch.tensor([9.9, 10.0, 10.1, -100.0], dtype=F64)

    check(SPEC, "gating", a, a, torch.zeros(4, dtype=F64), dt_bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gating_of_narrow_inputs_is_float32_and_never_rounded(dtype):
    spec, rng = replace(SPEC, dtype=dtype, state_dtype=torch.float32), generator()
    a, b = ab(spec, rng, 50)

    g, beta = check(spec, "gating", a, b, *decays(spec, rng), tolerance=1e-5)

    assert g.dtype == beta.dtype == torch.float32


def test_gating_of_no_tokens():
    rng = generator()

    check(SPEC, "gating", *ab(SPEC, rng, 0), *decays(SPEC, rng))


@both_layouts
@pytest.mark.parametrize("H, HV", [(2, 2), (2, 4), (1, 3), (2, 8), (1, 8)])
@pytest.mark.parametrize("K, V", [(4, 4), (3, 5), (6, 2)])
def test_value_heads_share_query_and_key_heads(state_layout, H, HV, K, V):
    spec = replace(
        SPEC, num_k_heads=H, num_v_heads=HV, head_k_dim=K, head_v_dim=V, state_layout=state_layout
    )
    rng = generator()
    inputs = *qkv(spec, rng, 3), *ab(spec, rng, 3), *decays(spec, rng)
    state = state_pool(spec, rng, 5, live=[4, 0, 2])

    check(spec, "recurrent_decode", *inputs, state, state_indices=slots(4, 0, 2))


@pytest.mark.parametrize("changes", [{"scale": 0.7}, {"qk_l2norm": False}, {"scale": 1.0}])
def test_scale_and_normalisation(changes):
    spec, rng = replace(SPEC, **changes), generator()
    inputs = *qkv(spec, rng, 2), *ab(spec, rng, 2), *decays(spec, rng)
    state = state_pool(spec, rng, 2, live=[1, 0])

    check(spec, "recurrent_decode", *inputs, state, state_indices=slots(1, 0))


@paddings
def test_padding_rows_are_zero_and_other_slots_untouched(pad_slot, indices):
    spec, rng, state_indices = replace(SPEC, pad_slot=pad_slot), generator(), slots(*indices)
    inputs = *qkv(spec, rng, 4), *ab(spec, rng, 4)
    for tensor in inputs:
        tensor[state_indices <= pad_slot] = float("nan")
    state = state_pool(spec, rng, 5, live=state_indices[state_indices > pad_slot])

    check(
        spec,
        "recurrent_decode",
        *inputs,
        *decays(spec, rng),
        state,
        state_indices=state_indices,
        out=nan(4, 4, 3),
    )


def test_one_slot_read_repeatedly_and_others_written_unless_padded():
    rng = generator()
    inputs = *qkv(SPEC, rng, 4, real=3), *ab(SPEC, rng, 4, real=3), *decays(SPEC, rng)

    check(
        SPEC,
        "recurrent_decode",
        *inputs,
        state_pool(SPEC, rng, 8, live=[7]),
        state_indices=slots(7, 7, 7, -1),
        out_state_indices=slots(0, -1, 6, 2),
    )


@index_forms
def test_index_tensors_of_any_form(form):
    rng = generator()
    inputs = *qkv(SPEC, rng, 3), *ab(SPEC, rng, 3), *decays(SPEC, rng)

    check(
        SPEC,
        "recurrent_decode",
        *inputs,
        state_pool(SPEC, rng, 8, live=[7, 2]),
        state_indices=form(slots(7, 2, 7)),
        out_state_indices=form(slots(1, 0, 3)),
    )


@both_layouts
def test_states_in_pages_are_advanced_in_place(state_layout):
    spec, rng = replace(SPEC, state_layout=state_layout), generator()
    inputs = *qkv(spec, rng, 3), *ab(spec, rng, 3), *decays(spec, rng)
    state = state_pool(spec, rng, 6, live=[5, 0, 3], paged=True)

    check(spec, "recurrent_decode", *inputs, state, state_indices=slots(5, 0, 3))


def test_no_sequences_return_no_rows():
    rng = generator()
    inputs = *qkv(SPEC, rng, 0), *ab(SPEC, rng, 0), *decays(SPEC, rng)

    check(
        SPEC, "recurrent_decode", *inputs, state_pool(SPEC, rng, 2, live=[]), state_indices=slots()
    )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_out_is_written_through_its_strides(dtype, tolerance):
    rng = generator()
    inputs = *qkv(SPEC, rng, 3), *ab(SPEC, rng, 3), *decays(SPEC, rng)

    check(
        SPEC,
        "recurrent_decode",
        *inputs,
        state_pool(SPEC, rng, 3, live=[2, 1]),
        state_indices=slots(2, -1, 1),
        out=nan(3, 4, 7, dtype=dtype)[..., 2:5],
        tolerance=tolerance,
    )


@pytest.mark.parametrize("a", [19.9, 20.0, 20.1, -90.0, 96.0])
def test_decays_at_the_edges_of_softplus(a):
    rng = generator()
    A_log, dt_bias = torch.full((4,), -3.0, dtype=F64), torch.zeros(4, dtype=F64)
    inputs = *qkv(SPEC, rng, 1), torch.full((1, 4), a, dtype=F64), random(rng, 1, 4)
    state = state_pool(SPEC, rng, 1, live=[0])

    check(SPEC, "recurrent_decode", *inputs, A_log, dt_bias, state, state_indices=slots(0))


def test_keys_of_zero_only_decay_the_state():
    rng = generator()
    q, k, v = qkv(SPEC, rng, 2)
    inputs = q, k.zero_(), v, *ab(SPEC, rng, 2), *decays(SPEC, rng)
    state = state_pool(SPEC, rng, 2, live=[1, 0])

    check(SPEC, "recurrent_decode", *inputs, state, state_indices=slots(1, 0))


@pytest.mark.parametrize("gate_activation", ["silu", "sigmoid"])
def test_norm_then_gate(gate_activation):
    spec, rng = replace(SPEC, gate_activation=gate_activation), generator()
    x = packed(rng, 5, 12)[0].unflatten(1, (4, 3))

    check(spec, "gated_rms_norm", x, gate(spec, rng, 5), random(rng, 3), eps=1e-2)


def test_norm_of_a_head_of_zeroes_is_zero_whatever_the_gate():
    rng = generator()
    x = random(rng, 3, 4, 3)
    x[1], x[2, 0], x[0, :, 1] = 0, 0, 0
    z = random(rng, 3, 4, 3)
    z[1], z[2, 0] = float("nan"), float("inf")

    check(SPEC, "gated_rms_norm", x, z, random(rng, 3))


def test_norm_may_overwrite_its_input_or_write_another_dtype():
    rng = generator()
    x = packed(rng, 3, 12)[0].unflatten(1, (4, 3))

    check(
        SPEC,
        "gated_rms_norm",
        x,
        gate(SPEC, rng, 3),
        random(rng, 3),
        out=nan(3, 4, 3, dtype=torch.float32),
        tolerance=1e-6,
    )
    check(SPEC, "gated_rms_norm", x, gate(SPEC, rng, 3), random(rng, 3), out=x)


@pytest.mark.parametrize("gate_activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("z", [-90.0, -1e4, -1e38])
def test_gates_far_below_zero_are_closed(gate_activation, z):
    spec, ones = replace(FLOAT32, gate_activation=gate_activation), torch.ones(2, 4, 3)

    check(spec, "gated_rms_norm", ones, z * ones, ones[0, 0])


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("targets", [None, (0, 3, -1, 6)])
def test_step_with_a_gate_joins_the_ops(paged, bias, targets):
    spec, rng = replace(SPEC, conv_window=6), generator()
    rows = packed(rng, 4, spec.conv_dim)[0], *ab(spec, rng, 4)
    for tensor in rows:
        tensor[1] = float("nan")

    check(
        spec,
        "decode_step",
        *rows,
        params(spec, rng, bias=bias),
        pool(spec, rng, 9, live=[8, 1, 2], paged=paged),
        state_indices=slots(8, -1, 1, 2),
        out_state_indices=targets and slots(*targets),
        gate=gate(spec, rng, 4),
        out=nan(4, 4, 3),
    )


def test_step_without_a_gate_leaves_its_input_as_it_is():
    rng = generator()

    check(
        SPEC,
        "decode_step",
        mixed_qkv(SPEC, rng, 2),
        *ab(SPEC, rng, 2),
        params(SPEC, rng),
        pool(SPEC, rng, 4, live=[3, 0]),
        state_indices=slots(3, 0),
    )


@pytest.mark.parametrize("length", [1, 2, 3, 20])
def test_decodes_equal_one_prefill(length):
    rng, ops = generator(), cpu(SPEC)
    states, weights = pool(SPEC, rng, 2, live=[1]), params(SPEC, rng)
    rows = mixed_qkv(SPEC, rng, length), *ab(SPEC, rng, length)
    prefilled = copies(states)
    metadata = PrefillMetadata(offsets(length), slots(1))

    want = ops.prefill_step(*rows, weights, prefilled, metadata=metadata)
    got = [
        ops.decode_step(*row, weights, states, state_indices=slots(1))
        for row in zip(*(tensor.split(1) for tensor in rows), strict=True)
    ]

    assert_close(torch.cat(got), want)
    assert_close(states.conv_state[1], prefilled.conv_state[1])
    assert_close(states.state[1], prefilled.state[1])


def _count(counts, flush, room):
    """Count what is deferred after a call, as the contract says."""
    return torch.where((counts == room) | flush, 0, counts + 1)


@both_layouts
@pytest.mark.parametrize("room", [1, 2, 5])
@pytest.mark.parametrize("qk_l2norm", [True, False])
def test_states_that_are_written_now_and_then_are_those_that_always_are(
    room, qk_l2norm, state_layout
):
    spec = replace(SPEC, state_layout=state_layout, qk_l2norm=qk_l2norm)
    rng, ops, live = generator(), cpu(spec), torch.tensor([True, False, True])
    always, weights = pool(spec, rng, 6, live=[5, 2], paged=True), params(spec, rng)
    seldom, counts = copies(always), slots(0, 0, 0)
    deferred = deferred_updates(spec, rng, 6, room, counts={})
    for step in range(3 * room):
        rows = mixed_qkv(spec, rng, 3), *ab(spec, rng, 3)
        batch = {"state_indices": slots(5, -1, 2), "gate": gate(spec, rng, 3)}
        flush = torch.tensor([step == 2, True, False])
        before = copies(seldom)

        want = ops.decode_step(*rows, weights, always, **batch)
        got = ops.decode_step(
            *rows, weights, seldom, deferred=deferred, num_deferred=counts, flush=flush, **batch
        )

        writes = live & ((counts == room) | flush)
        counts = _count(counts, flush, room)
        assert_close(got, want)
        assert_close(seldom.conv_state[[5, 2]], always.conv_state[[5, 2]])
        for slot, written in ((5, writes[0]), (2, writes[2])):
            expected = always if written else before
            assert_close(seldom.state[slot], expected.state[slot])


def test_what_is_deferred_is_carried_out_in_other_slots():
    rng, ops = generator(), cpu(SPEC)
    states, weights = pool(SPEC, rng, 6, live=[5, 2]), params(SPEC, rng)
    deferred = deferred_updates(SPEC, rng, 6, 4, counts={5: 4, 2: 1})
    rows = mixed_qkv(SPEC, rng, 3), *ab(SPEC, rng, 3)
    batch = {"state_indices": slots(5, 5, 2), "num_deferred": slots(4, 4, 1)}
    before, kept, alone = copies(states), copies(deferred), copies(states)

    got = ops.decode_step(
        *rows, weights, states, out_state_indices=slots(0, -1, 3), deferred=deferred, **batch
    )
    # in place, one row at a time
    flush = torch.tensor([True])
    for row, slot, target in ((0, 5, 0), (2, 2, 3)):
        want = ops.decode_step(
            *(x[row : row + 1] for x in rows), weights, alone, state_indices=slots(slot),
            deferred=copies(kept), num_deferred=slots(4 if slot == 5 else 1), flush=flush,
        )  # fmt: skip
        assert_close(got[row : row + 1], want)
        assert_close(states.state[target], alone.state[slot])
        assert_close(states.conv_state[target], alone.conv_state[slot])
    for slot in (5, 2):
        assert_close(states.state[slot], before.state[slot])
    for after, was in zip(tensors(deferred), tensors(kept), strict=True):
        torch.testing.assert_close(after, was, rtol=0, atol=0, equal_nan=True)


@both_layouts
@pytest.mark.parametrize("qk_l2norm", [True, False])
def test_what_is_deferred_is_written_without_a_token(qk_l2norm, state_layout):
    spec = replace(SPEC, state_layout=state_layout, qk_l2norm=qk_l2norm)
    rng, ops = generator(), cpu(spec)
    always, weights = pool(spec, rng, 6, live=[5, 2], paged=True), params(spec, rng)
    seldom, counts = copies(always), slots(0, 0)
    deferred = deferred_updates(spec, rng, 6, 4, counts={})
    for _ in range(3):
        rows, batch = (mixed_qkv(spec, rng, 2), *ab(spec, rng, 2)), {"state_indices": slots(5, 2)}
        ops.decode_step(*rows, weights, always, **batch)
        ops.decode_step(*rows, weights, seldom, deferred=deferred, num_deferred=counts, **batch)
        counts += 1
    before, kept = copies(seldom), copies(deferred)

    others = {"num_deferred": slots(3, 3, 3), "out_state_indices": slots(1, -1, 0)}
    write_deferred(ops, seldom.state, deferred, state_indices=slots(5, 5, -1), **others)
    assert_close(seldom.state[1], always.state[5])
    assert_close(seldom.state[[5, 2]], before.state[[5, 2]])
    write_deferred(
        ops, seldom.state, deferred, state_indices=slots(-1, 2), num_deferred=slots(3, 3)
    )

    assert_close(seldom.state[2], always.state[2])
    assert_close(seldom.state[5], before.state[5])
    for after, was in zip(tensors(deferred), tensors(kept), strict=True):
        torch.testing.assert_close(after, was, rtol=0, atol=0, equal_nan=True)


def test_nothing_deferred_leaves_the_bits_of_a_state():
    rng, ops = generator(), cpu(SPEC)
    states = pool(SPEC, rng, 6, live=[5, 2])
    before, deferred = copies(states), deferred_updates(SPEC, rng, 6, 4, counts={})

    write_deferred(ops, states.state, deferred, state_indices=slots(5, 2), num_deferred=slots(0, 0))

    assert torch.equal(states.state[[5, 2]], before.state[[5, 2]])


def test_without_a_count_nothing_was_deferred():
    rng, ops = generator(), cpu(SPEC)
    states, weights = pool(SPEC, rng, 3, live=[1]), params(SPEC, rng)
    plain, before = copies(states), copies(states)
    deferred = deferred_updates(SPEC, rng, 3, 2, counts={})
    rows = mixed_qkv(SPEC, rng, 1), *ab(SPEC, rng, 1)

    got = ops.decode_step(*rows, weights, states, state_indices=slots(1), deferred=deferred)

    assert_close(got, ops.decode_step(*rows, weights, plain, state_indices=slots(1)))
    assert_close(states.state[1], before.state[1])
    assert not any(x[1, 0].isnan().any() for x in tensors(deferred))
    assert all(x[[0, 2]].isnan().all() and x[1, 1].isnan().all() for x in tensors(deferred))


@pytest.mark.parametrize("argument", range(6))
def test_step_is_differentiable(argument):
    spec, rng = replace(SPEC, num_v_heads=2, head_k_dim=2, head_v_dim=2), generator()
    states, weights, ops = pool(spec, rng, 2, live=[1, 0]), params(spec, rng), cpu(spec)
    rows = mixed_qkv(spec, rng, 2), *ab(spec, rng, 2)
    inputs = [*rows, weights.conv_weight, weights.A_log, weights.dt_bias]

    def outputs(tensor):
        replaced = [*inputs[:argument], tensor, *inputs[argument + 1 :]]
        x, a, b, conv_weight, A_log, dt_bias = replaced
        leaves = replace(weights, conv_weight=conv_weight, A_log=A_log, dt_bias=dt_bias)
        return ops.decode_step(x, a, b, leaves, copies(states), state_indices=slots(1, 0))

    assert torch.autograd.gradcheck(outputs, inputs[argument].requires_grad_())
