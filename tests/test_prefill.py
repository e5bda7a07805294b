# SPDX-License-Identifier: Apache-2.0
"""chunk_prefill and prefill_step against the oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gdn_portable import PrefillMetadata, StateLayout
from tests.calls import DECODES, PREFILLS, call_of, contents, run
from tests.cases import (
    FLOAT32,
    SPEC,
    ab,
    assert_close,
    check,
    copies,
    cpu,
    flags,
    g_beta,
    gate,
    generator,
    index_forms,
    mixed_qkv,
    nan,
    offsets,
    over_long,
    packed,
    params,
    pool,
    qkv,
    slots,
    state_pool,
    strided,
)

both_layouts = pytest.mark.parametrize("state_layout", list(StateLayout))


@both_layouts
@pytest.mark.parametrize("H, HV", [(2, 2), (2, 4), (1, 3), (2, 8), (1, 8)])
@pytest.mark.parametrize("K, V", [(4, 4), (3, 5), (6, 2)])
def test_value_heads_share_query_and_key_heads(state_layout, H, HV, K, V):
    spec = replace(
        SPEC, num_k_heads=H, num_v_heads=HV, head_k_dim=K, head_v_dim=V, state_layout=state_layout
    )
    rng = generator()
    state = state_pool(spec, rng, 4, live=[3])
    metadata = PrefillMetadata(offsets(66, 2), slots(3, 0), flags(True, False))

    check(
        spec, "chunk_prefill", *qkv(spec, rng, 68), *g_beta(spec, rng, 68), state, metadata=metadata
    )


@pytest.mark.parametrize("continued", [(True,) * 10, (True, False) * 5, (False, True) * 5])
def test_lengths_around_the_chunk(continued):
    rng = generator()
    lengths = (1, 0, 2, 3, 63, 64, 65, 128, 129, 200)
    state = state_pool(SPEC, rng, 10, live=flags(*continued).nonzero().flatten())
    metadata = PrefillMetadata(offsets(*lengths), slots(*range(10)), flags(*continued))
    T = sum(lengths)

    check(
        SPEC,
        "chunk_prefill",
        *qkv(SPEC, rng, T + 3, real=T),
        *g_beta(SPEC, rng, T + 3),
        state,
        metadata=metadata,
    )


@pytest.mark.parametrize("lengths", [(0, 4, 5), (4, 0, 5), (4, 5, 0), (0, 0, 0)])
@pytest.mark.parametrize(
    "continued, live", [(None, [1, 0, 2]), ((True,) * 3, [1, 0, 2]), ((False,) * 3, [])]
)
@pytest.mark.parametrize("targets", [None, (6, 7, 5)])
def test_empty_sequences_zero_or_copy_states(lengths, continued, live, targets):
    rng = generator()
    state = state_pool(SPEC, rng, 8, live)
    metadata = PrefillMetadata(
        offsets(*lengths),
        slots(1, 0, 2),
        continued and flags(*continued),
        targets and slots(*targets),
    )
    inputs = *qkv(SPEC, rng, 12, real=sum(lengths)), *g_beta(SPEC, rng, 12)

    check(SPEC, "chunk_prefill", *inputs, state, metadata=metadata)


@pytest.mark.parametrize("rows", [0, 4])
def test_no_sequences_give_zero_rows_and_touch_nothing(rows):
    rng = generator()
    state = state_pool(SPEC, rng, 3, live=[])
    inputs = *qkv(SPEC, rng, rows, real=0), *g_beta(SPEC, rng, rows)

    check(SPEC, "chunk_prefill", *inputs, state, metadata=PrefillMetadata(offsets(), slots()))


@pytest.mark.parametrize("pad_slot, indices", [(-1, (4, -1, 1, -2)), (0, (4, 0, 1, -1))])
@pytest.mark.parametrize("continued", [None, (True, True, True, False)])
def test_padding_rows_are_zero_and_other_slots_untouched(pad_slot, indices, continued):
    spec, rng = replace(SPEC, pad_slot=pad_slot), generator()
    state = state_pool(spec, rng, 5, live=[4, 1])
    metadata = PrefillMetadata(
        offsets(3, 66, 4, 1), slots(*indices), continued and flags(*continued)
    )
    inputs = *qkv(spec, rng, 80, real=73), *g_beta(spec, rng, 80)
    for tensor in inputs:
        tensor[3:69] = float("nan")
        tensor[73:] = float("nan")

    check(spec, "chunk_prefill", *inputs, state, metadata=metadata, out=nan(80, 4, 3))


def test_one_slot_read_repeatedly_and_others_written_unless_padded():
    rng = generator()
    state = state_pool(SPEC, rng, 8, live=[7])
    metadata = PrefillMetadata(
        offsets(3, 1, 5, 2, 0),
        slots(7, 7, 7, -1, 7),
        out_state_indices=slots(0, -1, 6, 2, 3),
    )
    inputs = *qkv(SPEC, rng, 11), *g_beta(SPEC, rng, 11)

    check(SPEC, "chunk_prefill", *inputs, state, metadata=metadata)


def checkpointed(continued=None):
    """Checkpoints at the start, in a chunk, at its end, at the last token, and none."""
    return PrefillMetadata(
        offsets(2, 70, 130, 65, 9, 0),
        slots(0, 1, 2, 3, 4, 5),
        continued and flags(*continued),
        checkpoint_offsets=slots(0, 30, 64, 65, -1, 0),
        checkpoint_indices=slots(13, 6, 7, 9, -1, 10),
    )


@both_layouts
@pytest.mark.parametrize("continued, live", [(None, range(6)), ((False,) * 6, [])])
def test_checkpoints_go_to_slots(state_layout, continued, live):
    spec, rng = replace(SPEC, state_layout=state_layout), generator()
    state = state_pool(spec, rng, 14, live)
    inputs = *qkv(spec, rng, 276), *g_beta(spec, rng, 276)

    check(spec, "chunk_prefill", *inputs, state, metadata=checkpointed(continued))


@both_layouts
@pytest.mark.parametrize(
    "spec, tolerance",
    [
        (SPEC, 1e-10),
        (FLOAT32, 1e-5),
        (replace(FLOAT32, dtype=torch.bfloat16, state_dtype=torch.bfloat16), 0.05),
    ],
    ids=["float64", "float32", "bfloat16"],
)
def test_checkpoints_go_to_rows_of_checkpoint_state(state_layout, spec, tolerance):
    spec, rng = replace(spec, state_layout=state_layout), generator()
    state = state_pool(spec, rng, 6, live=range(6))
    checkpoint_state = nan(14, *state.shape[1:], dtype=spec.compute_dtype)
    inputs = *qkv(spec, rng, 276), *g_beta(spec, rng, 276)

    check(
        spec,
        "chunk_prefill",
        *inputs,
        state,
        metadata=checkpointed(),
        checkpoint_state=checkpoint_state,
        tolerance=tolerance,
    )


def test_a_checkpoint_is_kept_though_the_sequence_writes_nothing():
    rng = generator()
    state = state_pool(SPEC, rng, 5, live=[2])
    metadata = PrefillMetadata(
        offsets(9, 4),
        slots(2, -1),
        out_state_indices=slots(-1, 0),
        checkpoint_offsets=slots(5, 2),
        checkpoint_indices=slots(4, 1),
    )
    inputs = *qkv(SPEC, rng, 13), *g_beta(SPEC, rng, 13)

    check(SPEC, "chunk_prefill", *inputs, state, metadata=metadata)


@pytest.mark.parametrize("pad_slot, index", [(-1, -1), (-1, -2), (0, 0)])
def test_a_checkpoint_with_a_padded_index_is_not_kept(pad_slot, index):
    spec, rng = replace(SPEC, pad_slot=pad_slot), generator()
    metadata = PrefillMetadata(
        offsets(9), slots(2), checkpoint_offsets=slots(5), checkpoint_indices=slots(index)
    )
    rows = mixed_qkv(spec, rng, 9), *ab(spec, rng, 9)

    check(
        spec,
        "prefill_step",
        *rows,
        params(spec, rng),
        pool(spec, rng, 4, live=[2]),
        metadata=metadata,
    )


@index_forms
def test_index_tensors_of_any_form(form):
    rng = generator()
    state = state_pool(SPEC, rng, 8, live=[7, 2])
    metadata = PrefillMetadata(
        strided(offsets(3, 0, 4, dtype=torch.int64)),
        form(slots(7, 1, 2)),
        strided(over_long(flags(True, False, True))),
        form(slots(7, 3, -1)),
        form(slots(2, -1, 4)),
        form(slots(5, -1, 6)),
    )
    inputs = *qkv(SPEC, rng, 7), *g_beta(SPEC, rng, 7)

    check(SPEC, "chunk_prefill", *inputs, state, metadata=metadata)


@both_layouts
def test_states_in_pages_are_advanced_in_place(state_layout):
    spec, rng = replace(SPEC, state_layout=state_layout), generator()
    state = state_pool(spec, rng, 6, live=[5, 0], paged=True)
    metadata = PrefillMetadata(offsets(70, 1), slots(5, 0))
    inputs = *qkv(spec, rng, 71), *g_beta(spec, rng, 71)

    check(spec, "chunk_prefill", *inputs, state, metadata=metadata)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_out_is_written_through_its_strides(dtype):
    rng = generator()
    state = state_pool(SPEC, rng, 3, live=[2])
    metadata = PrefillMetadata(offsets(4, 1), slots(2, -1))
    out = nan(6, 4, 7, dtype=dtype)[..., 2:5]

    check(
        SPEC,
        "chunk_prefill",
        *qkv(SPEC, rng, 6, real=4),
        *g_beta(SPEC, rng, 6),
        state,
        metadata=metadata,
        out=out,
        tolerance=1e-6,
    )


def check_one_sequence(spec, rng, q, k, v, g, beta):
    state = state_pool(spec, rng, 2, live=[1])
    metadata = PrefillMetadata(offsets(len(v)), slots(1))

    check(spec, "chunk_prefill", q, k, v, g, beta, state, metadata=metadata)


def test_scale_is_used():
    spec, rng = replace(SPEC, scale=0.7), generator()

    check_one_sequence(spec, rng, *qkv(spec, rng, 70), *g_beta(spec, rng, 70))


def test_queries_and_keys_may_come_normalised():
    spec, rng = replace(SPEC, qk_l2norm=False), generator()
    q, k, v = qkv(spec, rng, 70)
    k = k / k.norm(dim=-1, keepdim=True)

    check_one_sequence(spec, rng, q, k, v, *g_beta(spec, rng, 70))


def test_keys_of_zero_only_decay_the_state():
    rng = generator()
    q, k, v = qkv(SPEC, rng, 70)

    check_one_sequence(SPEC, rng, q, k.zero_(), v, *g_beta(SPEC, rng, 70))


def test_a_repeated_token_with_beta_near_one_and_g_near_zero():
    rng, ones = generator(), torch.ones(200, 4, dtype=torch.float64)
    q, k, v = (tensor.repeat(200, 1, 1) for tensor in qkv(SPEC, rng, 1))

    check_one_sequence(SPEC, rng, q, k, v, -1e-9 * ones, (1 - 1e-9) * ones)


def test_decays_that_underflow_within_a_chunk():
    rng = generator()
    g, beta = g_beta(SPEC, rng, 130)

    check_one_sequence(SPEC, rng, *qkv(SPEC, rng, 130), 400 * g, beta)


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("gate_activation", ["silu", "sigmoid"])
def test_planned_step_with_a_gate_joins_the_ops(paged, gate_activation):
    spec, rng = replace(SPEC, gate_activation=gate_activation, conv_window=6), generator()
    metadata = PrefillMetadata(
        offsets(66, 3, 0, 2),
        slots(8, 2, 0, -1),
        flags(True, False, True, False),
        checkpoint_offsets=slots(65, -1, 0, 1),
        checkpoint_indices=slots(4, -1, 5, 6),
        seq_lens_cpu=[66, 3, 0, 2],
    )
    cpu(spec).plan_prefill(metadata)

    check(
        spec,
        "prefill_step",
        packed(rng, 73, spec.conv_dim, real=69)[0],
        *ab(spec, rng, 73, real=69),
        params(spec, rng),
        pool(spec, rng, 9, live=[8, 0], paged=paged),
        metadata=metadata,
        gate=gate(spec, rng, 73),
        out=nan(73, 4, 3),
    )


def test_step_keeps_states_in_checkpoint_state_and_no_window():
    rng = generator()
    states = pool(SPEC, rng, 5, live=[0])
    metadata = PrefillMetadata(
        offsets(9), slots(0), checkpoint_offsets=slots(6), checkpoint_indices=slots(3)
    )

    check(
        SPEC,
        "prefill_step",
        mixed_qkv(SPEC, rng, 9),
        *ab(SPEC, rng, 9),
        params(SPEC, rng),
        states,
        metadata=metadata,
        checkpoint_state=nan(4, 4, 3, 5),
    )


@pytest.mark.parametrize("pieces", [(70, 1, 64, 65), (1, 1, 1, 197), (0, 128, 0, 72)])
def test_prefill_in_pieces_equals_prefill_whole(pieces):
    rng, ops = generator(), cpu(SPEC)
    states, weights = pool(SPEC, rng, 1, live=[0]), params(SPEC, rng)
    rows = mixed_qkv(SPEC, rng, 200), *ab(SPEC, rng, 200)
    whole = copies(states)

    want = ops.prefill_step(*rows, weights, whole, metadata=PrefillMetadata(offsets(200), slots(0)))
    got = [
        ops.prefill_step(
            *piece, weights, states, metadata=PrefillMetadata(offsets(len(piece[0])), slots(0))
        )
        for piece in zip(*(tensor.split(pieces) for tensor in rows), strict=True)
    ]

    assert_close(torch.cat(got), want)
    assert_close(states, whole)


@pytest.mark.parametrize("argument", range(6))
def test_step_is_differentiable(argument):
    spec, rng = replace(SPEC, num_v_heads=2, head_k_dim=2, head_v_dim=2), generator()
    states = pool(spec, rng, 2, live=[1])
    weights = params(spec, rng)
    inputs = [
        mixed_qkv(spec, rng, 5),
        *ab(spec, rng, 5),
        weights.conv_weight,
        weights.A_log,
        weights.dt_bias,
    ]
    metadata = PrefillMetadata(offsets(3, 2), slots(1, 0), flags(True, False))
    ops = cpu(spec)

    def outputs(tensor):
        replaced = [*inputs[:argument], tensor, *inputs[argument + 1 :]]
        x, a, b, conv_weight, A_log, dt_bias = replaced
        leaves = replace(weights, conv_weight=conv_weight, A_log=A_log, dt_bias=dt_bias)
        return ops.prefill_step(x, a, b, leaves, copies(states), metadata=metadata)

    assert torch.autograd.gradcheck(outputs, inputs[argument].requires_grad_())


@pytest.mark.parametrize("case", [*PREFILLS, *DECODES])
def test_autocast_changes_no_bit(case):
    outputs, states = [], []
    for on in (False, True):
        call = call_of(case)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            outputs.append(run(case, call))
        states.append(contents(call))

    assert torch.equal(*outputs)
    assert states[0] == states[1]
