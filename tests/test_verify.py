# SPDX-License-Identifier: Apache-2.0
"""conv1d_verify, mtp_verify and verify_step against the oracle, chains under every protocol."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gdn_portable import ConvLayout, StateLayout, VerifyMetadata
from tests.cases import (
    SPEC,
    ab,
    check,
    conv_params,
    conv_pool,
    decays,
    gate,
    generator,
    index_forms,
    mixed_qkv,
    nan,
    offsets,
    over_long,
    packed,
    params,
    pending_drafts,
    pool,
    protocols,
    qkv,
    random,
    replay_drafts,
    slots,
    snapshot_drafts,
    state_pool,
    strided,
)

both_layouts = pytest.mark.parametrize(
    "layouts", [(ConvLayout.DIM_FIRST, StateLayout.VK), (ConvLayout.LEN_FIRST, StateLayout.KV)]
)
paddings = pytest.mark.parametrize(
    "pad_slot, indices", [(-1, (4, -1, 1, -2)), (0, (4, 0, 1, -1)), (-1, (-1, 0, -2, 4))]
)


def check_ops(spec, rng, states, T, *, real=None, **batch):
    """Check both verify ops on inputs of which rows from ``real`` on are NaN."""
    x = mixed_qkv(spec, rng, T, real)
    inputs = *qkv(spec, rng, T, real), *ab(spec, rng, T, real), *decays(spec, rng)

    check(spec, "conv1d_verify", x, *conv_params(spec, rng), states.conv_state, **batch)
    check(spec, "mtp_verify", *inputs, states.state, **batch)


def slot_table_pool(spec, rng, num_slots, live, windows):
    """States in the ``live`` slots; windows by pairs of a slot and their first column."""
    states = pool(spec, rng, num_slots, live)
    columns = states.conv_state
    columns = columns if spec.conv_layout is ConvLayout.DIM_FIRST else columns.mT
    columns[:] = float("nan")
    for slot, first in windows:
        history = random(rng, spec.conv_dim, spec.conv_width - 1)
        columns[slot, :, first : first + spec.conv_width - 1] = history
    return states


@protocols
@both_layouts
@pytest.mark.parametrize("width, window", [(2, None), (3, 5), (4, None), (4, 7)])
def test_chains(make_drafts, layouts, width, window):
    spec = replace(
        SPEC,
        conv_layout=layouts[0],
        state_layout=layouts[1],
        conv_width=width,
        conv_window=window,
    )
    rng = generator()
    states = pool(spec, rng, 6, live=[5, 0, 2])
    metadata = VerifyMetadata(slots(5, 0, 2), max_drafts=5)

    check_ops(spec, rng, states, 15, metadata=metadata, drafts=make_drafts(spec, 6, 5))


@protocols
@pytest.mark.parametrize("H, HV", [(2, 2), (1, 3), (2, 8), (1, 8)])
@pytest.mark.parametrize("changes", [{}, {"scale": 0.7, "qk_l2norm": False, "activation": None}])
def test_value_heads_share_query_and_key_heads(make_drafts, H, HV, changes):
    spec, rng = replace(SPEC, num_k_heads=H, num_v_heads=HV, **changes), generator()
    states = pool(spec, rng, 3, live=[2, 0])
    metadata = VerifyMetadata(slots(2, 0), max_drafts=3)

    check_ops(spec, rng, states, 6, metadata=metadata, drafts=make_drafts(spec, 3, 3))


@protocols
@pytest.mark.parametrize("lengths", [(0, 3, 1), (2, 0, 3), (3, 1, 0), (0, 0, 0), (1, 1, 1)])
def test_ragged_chains(make_drafts, lengths):
    rng = generator()
    states = pool(SPEC, rng, 6, live=[5, 0, 2])
    metadata = VerifyMetadata(slots(5, 0, 2), max_drafts=3, cu_seqlens=offsets(*lengths))
    drafts = make_drafts(SPEC, 6, 3)

    check_ops(SPEC, rng, states, 9, real=sum(lengths), metadata=metadata, drafts=drafts)


@protocols
@paddings
@pytest.mark.parametrize("lengths", [None, (2, 2, 1, 2)])
def test_padding_rows_are_zero_and_other_slots_untouched(make_drafts, pad_slot, indices, lengths):
    spec, rng = replace(SPEC, pad_slot=pad_slot), generator()
    states = pool(spec, rng, 5, live=[slot for slot in indices if slot > pad_slot])
    cu_seqlens = lengths and offsets(*lengths)
    metadata = VerifyMetadata(slots(*indices), 2, cu_seqlens, num_accepted=slots(0, 2, 0, 1))
    metadata.num_accepted[slots(*indices) > pad_slot] = 0
    T = 8
    owner = slots(*indices).repeat_interleave(slots(*(lengths or (2, 2, 2, 2))))
    padded = torch.cat([owner <= pad_slot, owner.new_ones(T - len(owner), dtype=torch.bool)])
    x, inputs = mixed_qkv(spec, rng, T), [*qkv(spec, rng, T), *ab(spec, rng, T)]
    for tensor in (x, *inputs):
        tensor[padded] = float("nan")
    batch = {"metadata": metadata, "drafts": make_drafts(spec, 5, 2)}

    check(spec, "conv1d_verify", x, *conv_params(spec, rng), states.conv_state, **batch)
    check(spec, "mtp_verify", *inputs, *decays(spec, rng), states.state, **batch, out=nan(8, 4, 3))


@protocols
@pytest.mark.parametrize("other", [99, -99])
def test_other_indices_of_padding_rows_may_hold_anything(make_drafts, other):
    rng = generator()
    states = pool(SPEC, rng, 5, live=[4])
    metadata = VerifyMetadata(
        slots(-1, 4, -2),
        2,
        num_accepted=slots(other, 0, other),
        rows=slots(other, 1, other),
        parents=torch.tensor([[other, other], [-1, 0], [other, other]]),
    )

    check_ops(SPEC, rng, states, 6, metadata=metadata, drafts=make_drafts(SPEC, 5, 2))


@protocols
@pytest.mark.parametrize("rows, cu_seqlens", [(0, None), (0, (0,)), (3, (0,))])
def test_no_sequences_give_zero_rows_and_touch_nothing(make_drafts, rows, cu_seqlens):
    rng, states = generator(), pool(SPEC, generator(), 2, live=[])
    metadata = VerifyMetadata(slots(), 3, cu_seqlens and offsets(*cu_seqlens[1:]))
    drafts = make_drafts(SPEC, 2, 3)

    check_ops(SPEC, rng, states, rows, real=0, metadata=metadata, drafts=drafts)


@protocols
@index_forms
def test_index_tensors_of_any_form(make_drafts, form):
    rng = generator()
    states = pool(SPEC, rng, 6, live=[5, 0, 2])
    metadata = VerifyMetadata(
        form(slots(5, 0, 2)),
        max_drafts=3,
        cu_seqlens=strided(offsets(3, 1, 2, dtype=torch.int64)),
        num_accepted=form(slots(0, 0, 0)),
        rows=form(slots(4, 1, 3)),
    )

    check_ops(SPEC, rng, states, 6, metadata=metadata, drafts=make_drafts(SPEC, 6, 3))


@protocols
def test_states_in_pages(make_drafts):
    rng = generator()
    states = pool(SPEC, rng, 6, live=[5, 0], paged=True)
    metadata = VerifyMetadata(slots(5, 0), max_drafts=3)

    check_ops(SPEC, rng, states, 6, metadata=metadata, drafts=make_drafts(SPEC, 6, 3))


@both_layouts
@pytest.mark.parametrize("accepted", [(0, 1, 2, 4), (4, 3, 0, 1)])
@pytest.mark.parametrize("lengths", [(4, 4, 4, 4), (2, 0, 4, 1)])
def test_replay_applies_pending_drafts_and_keeps_the_new_ones(layouts, accepted, lengths):
    spec = replace(SPEC, conv_layout=layouts[0], state_layout=layouts[1], conv_window=5)
    rng, indices = generator(), (6, 0, 3, 4)
    states = pool(spec, rng, 7, live=indices)
    drafts = pending_drafts(spec, rng, 7, 4, dict(zip(indices, accepted, strict=True)))
    metadata = VerifyMetadata(
        slots(*indices), 4, offsets(*lengths), num_accepted=slots(*accepted, dtype=torch.int64)
    )

    check_ops(spec, rng, states, 18, real=sum(lengths), metadata=metadata, drafts=drafts)


def test_replay_takes_num_accepted_of_any_form_and_states_in_pages():
    rng = generator()
    states = pool(SPEC, rng, 6, live=[5, 0], paged=True)
    drafts = pending_drafts(SPEC, rng, 6, 4, {5: 2, 0: 3})
    accepted = strided(over_long(slots(2, 3)))
    metadata = VerifyMetadata(slots(5, 0), max_drafts=4, num_accepted=accepted)

    check_ops(SPEC, rng, states, 8, metadata=metadata, drafts=drafts)


def test_replay_applies_more_pending_drafts_than_this_step_has():
    rng = generator()
    states = pool(SPEC, rng, 6, live=[5, 0])
    drafts = pending_drafts(SPEC, rng, 6, 4, {5: 4, 0: 3})
    metadata = VerifyMetadata(slots(5, 0), max_drafts=2, num_accepted=slots(4, 3))

    check_ops(SPEC, rng, states, 4, metadata=metadata, drafts=drafts)


def test_snapshots_leave_the_pool_and_num_accepted_alone():
    rng = generator()
    states = pool(SPEC, rng, 6, live=[5, 0])
    metadata = VerifyMetadata(slots(5, 0), max_drafts=3, num_accepted=slots(3, 2))

    check_ops(SPEC, rng, states, 6, metadata=metadata, drafts=snapshot_drafts(SPEC, 2, 3))


@both_layouts
def test_snapshots_go_to_named_rows_of_buffers_with_extra_steps(layouts):
    spec = replace(SPEC, conv_layout=layouts[0], state_layout=layouts[1])
    rng = generator()
    states = pool(spec, rng, 6, live=[5, 0])
    metadata = VerifyMetadata(slots(5, 0, 5), max_drafts=3, rows=slots(6, 0, 3))

    check_ops(spec, rng, states, 9, metadata=metadata, drafts=snapshot_drafts(spec, 7, 5))


@both_layouts
def test_snapshots_of_windows_may_overlap_in_a_chain(layouts):
    spec = replace(SPEC, conv_layout=layouts[0], state_layout=layouts[1])
    rng, D, P, columns = generator(), SPEC.conv_dim, 4, 9
    states = pool(spec, rng, 6, live=[5, 0])
    inputs = nan(3, D, columns)
    windows = inputs.as_strided((3, P, D, 3), (D * columns, 1, columns, 1))
    drafts = snapshot_drafts(spec, 3, P)
    drafts.conv_state = windows if layouts[0] is ConvLayout.DIM_FIRST else windows.mT
    metadata = VerifyMetadata(slots(5, 0), P, offsets(4, 2), rows=slots(2, 0))

    check_ops(spec, rng, states, 6, metadata=metadata, drafts=drafts)


def test_either_snapshot_may_be_missing():
    rng, metadata = generator(), VerifyMetadata(slots(1), max_drafts=2)
    x, inputs = mixed_qkv(SPEC, rng, 2), (*qkv(SPEC, rng, 2), *ab(SPEC, rng, 2))
    windows_only = replace(snapshot_drafts(SPEC, 1, 2), state=None)
    states_only = replace(snapshot_drafts(SPEC, 1, 2), conv_state=None)
    conv_state, state = conv_pool(SPEC, rng, 2, live=[1]), state_pool(SPEC, rng, 2, live=[1])
    batch = {"metadata": metadata}

    check(
        SPEC, "conv1d_verify", x, *conv_params(SPEC, rng), conv_state, **batch, drafts=windows_only
    )
    check(SPEC, "mtp_verify", *inputs, *decays(SPEC, rng), state, **batch, drafts=states_only)


SLOT_TABLE = torch.tensor([[9, 1, 2, 3], [0, 4, 5, 6], [7, 8, 10, 11]], dtype=torch.int32)


@both_layouts
@pytest.mark.parametrize("width, window", [(2, 4), (4, 6), (4, 9)])
@pytest.mark.parametrize("accepted", [None, (0, 1, 4), (3, 2, 0)])
def test_slot_table(layouts, width, window, accepted):
    spec = replace(
        SPEC,
        conv_layout=layouts[0],
        state_layout=layouts[1],
        conv_width=width,
        conv_window=window,
    )
    rng, columns = generator(), [max(n, 1) - 1 for n in accepted or (0, 0, 0)]
    live = [int(SLOT_TABLE[b, column]) for b, column in enumerate(columns)]
    windows = zip((9, 0, 7), columns, strict=True)
    states = slot_table_pool(spec, rng, 12, live, windows)
    metadata = VerifyMetadata(
        SLOT_TABLE.clone(), 4, num_accepted=slots(*accepted) if accepted else None
    )

    check_ops(spec, rng, states, 12, metadata=metadata)


@index_forms
@pytest.mark.parametrize("lengths", [(4, 2, 1), (0, 3, 4), (1, 0, 0)])
def test_ragged_slot_table_with_padding_and_index_tensors_of_any_form(form, lengths):
    spec, rng = replace(SPEC, conv_window=6), generator()
    table = SLOT_TABLE.clone()
    table[0, 2:] = -1
    table[2] = -2
    states = slot_table_pool(spec, rng, 12, live=[1, 0], windows=[(9, 1), (0, 0)])
    metadata = VerifyMetadata(form(table), 4, offsets(*lengths), num_accepted=form(slots(2, 1, 3)))

    check_ops(spec, rng, states, 9, real=sum(lengths[:2]), metadata=metadata)


def test_slot_table_wider_than_the_drafts():
    spec, rng = replace(SPEC, conv_window=5), generator()
    states = slot_table_pool(spec, rng, 12, live=[3, 0, 8], windows=[(9, 2), (0, 0), (7, 1)])
    metadata = VerifyMetadata(SLOT_TABLE.clone(), 2, num_accepted=slots(3, 1, 2))
    metadata.state_indices[0, 2] = 3
    metadata.state_indices[0, 3] = -1

    check_ops(spec, rng, states, 6, metadata=metadata)


def test_slot_table_in_pages():
    spec, rng = replace(SPEC, conv_window=6), generator()
    states = pool(spec, rng, 12, live=[9, 0, 7], paged=True)

    check_ops(spec, rng, states, 12, metadata=VerifyMetadata(SLOT_TABLE.clone(), 4))


inputs_of_any_stride = pytest.mark.parametrize(
    "inputs",
    [
        pytest.param(lambda rng, T: random(rng, SPEC.conv_dim, T).t(), id="transposed"),
        pytest.param(lambda rng, T: packed(rng, T, SPEC.conv_dim, 3)[0], id="slice"),
        pytest.param(lambda rng, T: strided(random(rng, T, SPEC.conv_dim)), id="strided"),
    ],
)


@protocols
@inputs_of_any_stride
def test_conv_writes_over_inputs_of_any_stride(make_drafts, inputs):
    rng, x = generator(), inputs(generator(1), 9)
    conv_state = conv_pool(SPEC, rng, 6, live=[5, 0])
    metadata = VerifyMetadata(slots(5, -1, 0), max_drafts=3)
    drafts = make_drafts(SPEC, 6, 3)
    batch = {"metadata": metadata, "drafts": drafts, "out": x}

    check(SPEC, "conv1d_verify", x, *conv_params(SPEC, rng), conv_state, **batch)


def test_conv_writes_over_the_inputs_of_a_slot_table():
    spec, rng = replace(SPEC, conv_window=6), generator()
    conv_state = conv_pool(spec, rng, 12, live=[9, 0, 7])
    x = mixed_qkv(spec, rng, 12)
    metadata = VerifyMetadata(SLOT_TABLE.clone(), max_drafts=4)

    check(spec, "conv1d_verify", x, *conv_params(spec, rng), conv_state, metadata=metadata, out=x)


@protocols
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_out_is_written_through_its_strides(make_drafts, dtype, tolerance):
    rng = generator()
    states = pool(SPEC, rng, 6, live=[5, 0])
    metadata = VerifyMetadata(slots(5, -1, 0), max_drafts=3)
    x, inputs = mixed_qkv(SPEC, rng, 9), (*qkv(SPEC, rng, 9), *ab(SPEC, rng, 9))
    batch = {"metadata": metadata, "drafts": make_drafts(SPEC, 6, 3), "tolerance": tolerance}
    mixed, o = nan(SPEC.conv_dim, 9, dtype=dtype).t(), nan(9, 4, 7, dtype=dtype)[..., 2:5]

    check(SPEC, "conv1d_verify", x, *conv_params(SPEC, rng), states.conv_state, **batch, out=mixed)
    check(SPEC, "mtp_verify", *inputs, *decays(SPEC, rng), states.state, **batch, out=o)


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("drafts", ["pending", "snapshot", None])
def test_step_with_a_gate_joins_the_ops(paged, drafts):
    spec, rng = replace(SPEC, conv_window=6), generator()
    states = pool(spec, rng, 12, live=[9, 0, 7], paged=paged, columns=6)
    made = {
        "pending": pending_drafts(spec, rng, 12, 4, {9: 1, 0: 0, 7: 1}),
        "snapshot": snapshot_drafts(spec, 3, 4),
    }
    indices = slots(9, 0, 7) if drafts else SLOT_TABLE.clone()

    check(
        spec,
        "verify_step",
        packed(rng, 12, spec.conv_dim)[0],
        *ab(spec, rng, 12),
        params(spec, rng),
        states,
        metadata=VerifyMetadata(indices, 4, num_accepted=slots(1, 0, 1)),
        drafts=made.get(drafts),
        gate=gate(spec, rng, 12),
        out=nan(12, 4, 3),
    )


def test_replay_keeps_inputs_where_slots_are_not_rows():
    rng = generator()
    states = pool(SPEC, rng, 6, live=[5])
    drafts = replay_drafts(SPEC, 6, 4)

    check_ops(SPEC, rng, states, 2, metadata=VerifyMetadata(slots(5), max_drafts=2), drafts=drafts)
