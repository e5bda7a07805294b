# SPDX-License-Identifier: Apache-2.0
"""The steps equal the oracle for any shape, layout, stride, length and choice of slots."""

from __future__ import annotations

from itertools import accumulate

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn_portable import ConvLayout, GdnSpec, PrefillMetadata, StateLayout, VerifyMetadata
from tests.cases import (
    F64,
    INDEX_FORMS,
    PROTOCOLS,
    check,
    flags,
    generator,
    packed,
    params,
    pending_drafts,
    pool,
    random_parents,
    slots,
    strided,
)

quick = settings(max_examples=300, deadline=None, derandomize=True, database=None)
small = st.integers(1, 5)


@st.composite
def specs(draw, extra_columns=0, qk_l2norm=None):
    H, width = draw(st.integers(1, 2)), draw(st.integers(2, 4))
    return GdnSpec(
        num_k_heads=H,
        num_v_heads=H * draw(st.integers(1, 3)),
        head_k_dim=draw(small),
        head_v_dim=draw(small),
        dtype=F64,
        state_dtype=F64,
        conv_width=width,
        conv_window=width - 1 + extra_columns + draw(st.integers(0, 2)),
        conv_layout=draw(st.sampled_from(ConvLayout)),
        state_layout=draw(st.sampled_from(StateLayout)),
        activation=draw(st.sampled_from(["silu", None])),
        gate_activation=draw(st.sampled_from(["silu", "sigmoid"])),
        scale=draw(st.sampled_from([None, 0.7])),
        qk_l2norm=draw(st.booleans()) if qk_l2norm is None else qk_l2norm,
        pad_slot=draw(st.sampled_from([-1, 0, 2])),
    )


@st.composite
def distinct_slots(draw, spec, sequences):
    """Twice as many slots as sequences and two to share, in any order, and how many there are."""
    count = 2 * sequences + 2
    first = spec.pad_slot + 1
    return draw(st.permutations(range(first, first + count))), first + count


@st.composite
def reads_and_writes(draw, spec, own, shared):
    """Slots read and slots written: one's own, a shared one, or padding on either side."""
    padding = st.integers(-2, spec.pad_slot)
    reads, writes = [], []
    for slot in own:
        kind = draw(st.sampled_from(["own", "shared", "padded", "padded target"]))
        reads.append({"shared": shared, "padded": draw(padding)}.get(kind, slot))
        writes.append(draw(padding) if kind == "padded target" else slot)
    return reads, writes


def rows(draw, spec, rng, T, padded):
    """mixed_qkv, a, b and a gate or None, in some stride, NaN in the rows of ``padded``."""
    HV, V = spec.num_v_heads, spec.head_v_dim
    x, a, b, gate = packed(rng, T, spec.conv_dim, HV, HV, HV * V)
    x = draw(st.sampled_from([x, strided(x), x.t().contiguous().t()]))
    for tensor in (x, a, b, gate):
        tensor[padded] = float("nan")
    return (x, a, b), draw(st.sampled_from([gate.unflatten(1, (HV, V)), None]))


def owners(lengths, indices, spec, extra):
    """Which of the packed rows, and of ``extra`` ones after them, are padding."""
    padded = [slot <= spec.pad_slot for slot in indices]
    per_row = [claim for claim, n in zip(padded, lengths, strict=True) for _ in range(n)]
    return flags(*per_row, *[True] * extra)


@quick
@given(st.data())
def test_decode_step_equals_the_oracle(data):
    draw, rng = data.draw, generator()
    spec, B = draw(specs()), draw(st.integers(0, 5))
    slot_order, num_slots = draw(distinct_slots(spec, B))
    reads, writes = draw(reads_and_writes(spec, slot_order[:B], slot_order[-1]))
    form = INDEX_FORMS[draw(st.sampled_from(list(INDEX_FORMS)))]
    inputs, gate = rows(draw, spec, rng, B, owners([1] * B, reads, spec, 0))
    live = [slot for slot in reads if slot > spec.pad_slot]

    check(
        spec,
        "decode_step",
        *inputs,
        params(spec, rng, bias=draw(st.booleans())),
        pool(spec, rng, num_slots, live, paged=draw(st.booleans())),
        state_indices=form(slots(*reads)),
        out_state_indices=form(slots(*writes)),
        gate=gate,
    )


@quick
@given(st.data())
def test_prefill_step_equals_the_oracle(data):
    draw, rng = data.draw, generator()
    # states grow without bound under long keys that are not normalised
    spec, N = draw(specs(qk_l2norm=True)), draw(st.integers(0, 4))
    lengths = draw(st.lists(st.integers(0, 8) | st.integers(62, 67), min_size=N, max_size=N))
    slot_order, num_slots = draw(distinct_slots(spec, N))
    reads, writes = draw(reads_and_writes(spec, slot_order[:N], slot_order[-1]))
    continued = draw(st.lists(st.booleans(), min_size=N, max_size=N))
    checkpoints = [draw(st.integers(-1, length)) for length in lengths]
    form = INDEX_FORMS[draw(st.sampled_from(list(INDEX_FORMS)))]
    extra = draw(st.integers(0, 3))
    inputs, gate = rows(draw, spec, rng, sum(lengths) + extra, owners(lengths, reads, spec, extra))
    live = [slot for slot, claim in zip(reads, continued, strict=True) if claim]
    metadata = PrefillMetadata(
        slots(*accumulate(lengths, initial=0)),
        form(slots(*reads)),
        flags(*continued),
        form(slots(*writes)),
        form(slots(*checkpoints)),
        form(slots(*slot_order[N : 2 * N])),
    )

    check(
        spec,
        "prefill_step",
        *inputs,
        params(spec, rng, bias=draw(st.booleans())),
        pool(
            spec, rng, num_slots, [s for s in live if s > spec.pad_slot], paged=draw(st.booleans())
        ),
        metadata=metadata,
        gate=gate,
    )


@quick
@given(st.data())
def test_verify_step_then_commit_equals_the_oracle(data):
    draw, rng = data.draw, generator(data.draw(st.integers(0, 99)))
    spec, B, P = draw(specs()), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(0, P), min_size=B, max_size=B))
    slot_order, num_slots = draw(distinct_slots(spec, B))
    indices = [draw(st.sampled_from([slot, slot, spec.pad_slot])) for slot in slot_order[:B]]
    accepted = draw(st.lists(st.integers(0, P), min_size=B, max_size=B))
    live = [slot for slot in indices if slot > spec.pad_slot]
    pending = {slot: n for slot, n in zip(indices, accepted, strict=True) if slot in live}
    form = INDEX_FORMS[draw(st.sampled_from(list(INDEX_FORMS)))]
    metadata = VerifyMetadata(
        form(slots(*indices)),
        P,
        slots(*accumulate(lengths, initial=0)),
        num_accepted=form(slots(*accepted)),
        rows=form(slots(*draw(st.permutations(range(B))))),
        parents=draw(st.sampled_from([None, random_parents(rng, B, P)])),
    )
    replay = pending_drafts(spec, rng, num_slots, P, pending)
    drafts = draw(st.sampled_from([replay, PROTOCOLS["snapshot"](spec, B, P + 1)]))
    inputs, gate = rows(draw, spec, rng, sum(lengths) + 2, owners(lengths, indices, spec, 2))
    states = pool(spec, rng, num_slots, live, paged=draw(st.booleans()))
    batch = {"metadata": metadata}

    check(
        spec, "verify_step", *inputs, params(spec, rng), states, drafts=drafts, gate=gate, **batch
    )
    check(
        spec,
        "mtp_commit",
        states,
        drafts,
        last_accepted=slots(*(draw(st.integers(-1, length - 1)) for length in lengths)),
        out_state_indices=draw(st.sampled_from([None, form(slots(*slot_order[B : 2 * B]))])),
        **batch,
    )


@quick
@given(st.data())
def test_verify_step_of_a_slot_table_equals_the_oracle(data):
    draw, rng = data.draw, generator()
    B, P = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    spec = draw(specs(extra_columns=P - 1))
    lengths = draw(st.lists(st.integers(0, P), min_size=B, max_size=B))
    slot_order, num_slots = draw(distinct_slots(spec, B * P))
    accepted = draw(st.lists(st.integers(0, P), min_size=B, max_size=B))
    table = torch.tensor(slot_order[: B * P], dtype=torch.int64).view(B, P)
    padded = draw(st.lists(st.booleans(), min_size=B, max_size=B))
    table[flags(*padded)] = draw(st.integers(-2, spec.pad_slot))
    read = [int(row[max(n, 1) - 1]) for row, n in zip(table, accepted, strict=True)]
    live = [slot for slot in (*read, *table[:, 0].tolist()) if slot > spec.pad_slot]
    for b, n in enumerate(accepted):
        table[b, max(draw(st.integers(1, P)), n) :] = spec.pad_slot
    inputs, gate = rows(draw, spec, rng, sum(lengths) + 2, owners(lengths, read, spec, 2))
    columns = spec.conv_width - 1 + P - 1

    check(
        spec,
        "verify_step",
        *inputs,
        params(spec, rng),
        pool(spec, rng, num_slots, set(live), paged=draw(st.booleans()), columns=columns),
        metadata=VerifyMetadata(
            INDEX_FORMS[draw(st.sampled_from(list(INDEX_FORMS)))](table),
            P,
            slots(*accumulate(lengths, initial=0)),
            num_accepted=slots(*accepted),
        ),
        gate=gate,
    )
