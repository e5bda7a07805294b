# SPDX-License-Identifier: Apache-2.0
"""conv1d_prefill and conv1d_update against the oracle; conv1d_verify is in test_verify."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gdn_portable import ConvLayout, PrefillMetadata
from tests.cases import (
    SPEC,
    check,
    conv_params,
    conv_pool,
    flags,
    generator,
    index_forms,
    mixed_qkv,
    nan,
    offsets,
    packed,
    random,
    slots,
    strided,
)

both_layouts = pytest.mark.parametrize("conv_layout", list(ConvLayout))
widths = pytest.mark.parametrize("width, window", [(2, None), (3, 3), (4, None), (4, 7)])
variants = pytest.mark.parametrize(
    "activation, bias", [("silu", True), ("silu", False), (None, True), (None, False)]
)


def layer(conv_layout, width, window, activation):
    return replace(
        SPEC,
        conv_layout=conv_layout,
        conv_width=width,
        conv_window=window,
        activation=activation,
    )


@both_layouts
@widths
@variants
def test_prefill_convolves_and_advances_the_windows(conv_layout, width, window, activation, bias):
    spec, rng = layer(conv_layout, width, window, activation), generator()
    weights = conv_params(spec, rng, bias=bias)
    conv_state = conv_pool(spec, rng, 6, live=[5, 0])
    metadata = PrefillMetadata(offsets(7, 2, 9), slots(5, 3, 0), flags(True, False, True))
    x = mixed_qkv(spec, rng, 18)

    check(spec, "conv1d_prefill", x, *weights, conv_state, metadata=metadata)


@both_layouts
@widths
@variants
def test_update_convolves_and_advances_the_windows(conv_layout, width, window, activation, bias):
    spec, rng = layer(conv_layout, width, window, activation), generator()
    weights = conv_params(spec, rng, bias=bias)
    conv_state = conv_pool(spec, rng, 6, live=[5, 0, 2])
    x = mixed_qkv(spec, rng, 3)

    check(spec, "conv1d_update", x, *weights, conv_state, state_indices=slots(5, 0, 2))


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("first_continues", [True, False])
def test_prefill_shorter_than_the_window(width, first_continues):
    spec, rng = replace(SPEC, conv_width=width), generator()
    continued = flags(*[first_continues, not first_continues] * 4)
    conv_state = conv_pool(spec, rng, 8, live=continued.nonzero().flatten())
    metadata = PrefillMetadata(offsets(1, 1, 2, 2, 3, 3, 4, 4), slots(*range(8)), continued)
    x = mixed_qkv(spec, rng, 20)

    check(spec, "conv1d_prefill", x, *conv_params(spec, rng), conv_state, metadata=metadata)


@pytest.mark.parametrize("lengths", [(0, 4, 5), (4, 0, 5), (4, 5, 0), (0, 0, 0)])
@pytest.mark.parametrize(
    "continued, live", [(None, [1, 0, 2]), ((True,) * 3, [1, 0, 2]), ((False,) * 3, [])]
)
@pytest.mark.parametrize("targets", [None, (6, 7, 5)])
def test_prefill_of_empty_sequences_zeroes_or_copies_windows(lengths, continued, live, targets):
    rng = generator()
    conv_state = conv_pool(SPEC, rng, 8, live)
    metadata = PrefillMetadata(
        offsets(*lengths),
        slots(1, 0, 2),
        continued and flags(*continued),
        targets and slots(*targets),
    )
    x = mixed_qkv(SPEC, rng, 12, real=sum(lengths))

    check(SPEC, "conv1d_prefill", x, *conv_params(SPEC, rng), conv_state, metadata=metadata)


@pytest.mark.parametrize("rows", [0, 4])
def test_prefill_of_no_sequences_is_zero_and_touches_nothing(rows):
    rng = generator()
    conv_state = conv_pool(SPEC, rng, 3, live=[])
    metadata = PrefillMetadata(offsets(), slots())
    x = nan(rows, SPEC.conv_dim)

    check(SPEC, "conv1d_prefill", x, *conv_params(SPEC, rng), conv_state, metadata=metadata)


def test_update_of_no_sequences_returns_no_rows():
    rng = generator()
    conv_state = conv_pool(SPEC, rng, 3, live=[])
    x = nan(0, SPEC.conv_dim)

    check(SPEC, "conv1d_update", x, *conv_params(SPEC, rng), conv_state, state_indices=slots())


paddings = pytest.mark.parametrize(
    "pad_slot, indices", [(-1, (4, -1, 1, -2)), (0, (4, 0, 1, -1)), (-1, (-1, 0, -2, 4))]
)


@paddings
@pytest.mark.parametrize("continued", [None, (True, True, True, True), (False,) * 4])
def test_prefill_padding_rows_are_zero_and_other_slots_untouched(pad_slot, indices, continued):
    spec, rng = replace(SPEC, pad_slot=pad_slot), generator()
    conv_state = conv_pool(spec, rng, 5, live=[slot for slot in indices if slot > pad_slot])
    metadata = PrefillMetadata(
        offsets(3, 2, 4, 1), slots(*indices), continued and flags(*continued)
    )
    x = mixed_qkv(spec, rng, 13, real=10)
    padded = slots(*indices).repeat_interleave(slots(3, 2, 4, 1)) <= pad_slot
    x[:10][padded] = float("nan")

    check(spec, "conv1d_prefill", x, *conv_params(spec, rng), conv_state, metadata=metadata)


@paddings
def test_update_padding_rows_are_zero_and_other_slots_untouched(pad_slot, indices):
    spec, rng = replace(SPEC, pad_slot=pad_slot), generator()
    conv_state = conv_pool(spec, rng, 5, live=[slot for slot in indices if slot > pad_slot])
    state_indices = slots(*indices)
    x = mixed_qkv(spec, rng, 4)
    x[state_indices <= pad_slot] = float("nan")
    weights = conv_params(spec, rng)

    check(spec, "conv1d_update", x, *weights, conv_state, state_indices=state_indices)


def test_prefill_reads_one_slot_repeatedly_and_writes_others_unless_padded():
    rng = generator()
    conv_state = conv_pool(SPEC, rng, 8, live=[7])
    metadata = PrefillMetadata(
        offsets(3, 1, 5, 2, 0),
        slots(7, 7, 7, -1, 7),
        out_state_indices=slots(0, -1, 6, 2, 3),
    )
    x = mixed_qkv(SPEC, rng, 11, real=9)

    check(SPEC, "conv1d_prefill", x, *conv_params(SPEC, rng), conv_state, metadata=metadata)


def test_update_reads_one_slot_repeatedly_and_writes_others_unless_padded():
    rng = generator()
    conv_state = conv_pool(SPEC, rng, 8, live=[7])
    x = mixed_qkv(SPEC, rng, 4, real=3)

    check(
        SPEC,
        "conv1d_update",
        x,
        *conv_params(SPEC, rng),
        conv_state,
        state_indices=slots(7, 7, 7, -1),
        out_state_indices=slots(0, -1, 6, 2),
    )


@both_layouts
@pytest.mark.parametrize("continued, live", [(None, range(6)), ((False,) * 6, [])])
def test_prefill_keeps_windows_at_checkpoints(conv_layout, continued, live):
    spec, rng = replace(SPEC, conv_layout=conv_layout, conv_window=5), generator()
    conv_state = conv_pool(spec, rng, 14, live)
    metadata = PrefillMetadata(
        offsets(2, 70, 64, 5, 9, 0),
        slots(0, 1, 2, 3, 4, 5),
        continued and flags(*continued),
        checkpoint_offsets=slots(0, 64, 64, -1, 1, 0),
        checkpoint_indices=slots(13, 6, 7, -1, 9, 10),
    )
    x = mixed_qkv(spec, rng, 150)

    check(spec, "conv1d_prefill", x, *conv_params(spec, rng), conv_state, metadata=metadata)


@index_forms
def test_prefill_takes_index_tensors_of_any_form(form):
    rng = generator()
    conv_state = conv_pool(SPEC, rng, 8, live=[7, 2])
    metadata = PrefillMetadata(
        strided(offsets(3, 0, 4, dtype=torch.int64)),
        form(slots(7, 1, 2)),
        strided(flags(True, False, True)),
        form(slots(7, 3, -1)),
        form(slots(2, -1, 4)),
        form(slots(5, -1, 6)),
    )
    x = mixed_qkv(SPEC, rng, 7)

    check(SPEC, "conv1d_prefill", x, *conv_params(SPEC, rng), conv_state, metadata=metadata)


@index_forms
def test_update_takes_index_tensors_of_any_form(form):
    rng = generator()
    conv_state = conv_pool(SPEC, rng, 8, live=[7, 2])

    check(
        SPEC,
        "conv1d_update",
        mixed_qkv(SPEC, rng, 3),
        *conv_params(SPEC, rng),
        conv_state,
        state_indices=form(slots(7, 2, 7)),
        out_state_indices=form(slots(1, 0, 3)),
    )


@both_layouts
@pytest.mark.parametrize(
    "paged, conv_dtype", [(True, None), (False, torch.float32)], ids=["paged", "float32"]
)
def test_windows_in_pages_or_of_another_dtype_are_advanced_in_place(conv_layout, paged, conv_dtype):
    spec, rng = replace(SPEC, conv_layout=conv_layout, conv_dtype=conv_dtype), generator()
    conv_state = conv_pool(spec, rng, 6, live=[5, 0], paged=paged)
    weights = conv_params(spec, rng)
    metadata = PrefillMetadata(offsets(3, 1), slots(5, 0))
    x = mixed_qkv(spec, rng, 4)

    check(spec, "conv1d_prefill", x, *weights, conv_state, metadata=metadata)
    check(spec, "conv1d_update", x[:2], *weights, conv_state, state_indices=slots(0, 5))


strided_inputs = pytest.mark.parametrize(
    "inputs",
    [
        pytest.param(lambda rng, T: random(rng, SPEC.conv_dim, T).t(), id="transposed"),
        pytest.param(lambda rng, T: packed(rng, T, SPEC.conv_dim, 3)[0], id="slice"),
        pytest.param(lambda rng, T: strided(random(rng, T, SPEC.conv_dim)), id="strided"),
    ],
)


@strided_inputs
def test_prefill_takes_inputs_of_any_stride(inputs):
    rng = generator()
    conv_state = conv_pool(SPEC, rng, 3, live=[2, 0])
    metadata = PrefillMetadata(offsets(6, 3), slots(2, 0))
    x = inputs(rng, 9)

    check(SPEC, "conv1d_prefill", x, *conv_params(SPEC, rng), conv_state, metadata=metadata)


@strided_inputs
def test_update_writes_over_inputs_of_any_stride(inputs):
    rng = generator()
    conv_state = conv_pool(SPEC, rng, 3, live=[2, 0])
    x = inputs(rng, 3)
    x[1] = float("nan")

    check(
        SPEC,
        "conv1d_update",
        x,
        *conv_params(SPEC, rng),
        conv_state,
        state_indices=slots(2, -1, 0),
        out=x,
    )


outs = pytest.mark.parametrize(
    "make_out, tolerance",
    [
        pytest.param(lambda: nan(6, SPEC.conv_dim), 1e-10, id="contiguous"),
        pytest.param(lambda: nan(6, SPEC.conv_dim, dtype=torch.float32), 1e-6, id="float32"),
        pytest.param(lambda: nan(SPEC.conv_dim, 6).t(), 1e-10, id="transposed"),
        pytest.param(lambda: nan(6, SPEC.conv_dim + 2)[:, 1:-1], 1e-10, id="slice"),
    ],
)


@outs
def test_prefill_writes_out(make_out, tolerance):
    rng = generator()
    conv_state = conv_pool(SPEC, rng, 3, live=[2])
    metadata = PrefillMetadata(offsets(4, 1), slots(2, -1))

    check(
        SPEC,
        "conv1d_prefill",
        mixed_qkv(SPEC, rng, 6, real=4),
        *conv_params(SPEC, rng),
        conv_state,
        metadata=metadata,
        out=make_out(),
        tolerance=tolerance,
    )


@outs
def test_update_writes_out(make_out, tolerance):
    rng = generator()
    conv_state = conv_pool(SPEC, rng, 7, live=range(7))

    check(
        SPEC,
        "conv1d_update",
        mixed_qkv(SPEC, rng, 6),
        *conv_params(SPEC, rng),
        conv_state,
        state_indices=slots(6, 5, -1, 3, 2, 0),
        out=make_out(),
        tolerance=tolerance,
    )
