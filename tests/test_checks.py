# SPDX-License-Identifier: Apache-2.0
"""Every tensor of every op: one of the wrong kind is one clear error, and nothing is written."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_portable import GdnSpec, InputError, bind, checks
from gdn_portable.checks.tensors import shape_text
from tests.calls import (
    CASES,
    COMMITS,
    DECODES,
    DEFERRED,
    NUM_SLOTS,
    PREFILLS,
    REPLAYS,
    SNAPSHOTS,
    SPEC,
    TABLES,
    call_of,
    leaves,
    refusal,
    replaced,
    run,
)
from tests.cases import slots, strided

STEPS = ("prefill_step", "decode_step", *(case for case in CASES if case.startswith("verify_step")))
# that an argument is a keyword Python says from 3.12 on
KEYWORD = "keyword-only " if sys.version_info >= (3, 12) else ""
# what a call is given and does not read, so that an engine may leave it as it is
NOT_READ = {
    **{
        ("plan_prefill", name): "only cu_seqlens are planned"
        for name in leaves(call_of("plan_prefill"))
        if name != "metadata__cu_seqlens"
    },
    ("conv1d_verify snapshot", "drafts__state"): "of the recurrence",
    ("mtp_verify snapshot", "drafts__conv_state"): "of the convolution",
    **{(case, "metadata__num_accepted"): "of the verify before" for case in COMMITS},
}
TENSORS = [
    (case, name) for case in CASES for name in leaves(call_of(case)) if (case, name) not in NOT_READ
]
every_tensor = pytest.mark.parametrize(("case", "name"), TENSORS)


def _tensors(*names: str) -> pytest.MarkDecorator:
    """Parametrize over the arguments, in every case that has them, whose last name is given."""
    chosen = [
        (case, name)
        for case, name in TENSORS
        if _own(name) in names and case != "gated_rms_norm"  # which takes any float
    ]
    return pytest.mark.parametrize(("case", "name"), chosen)


def _own(name: str) -> str:
    return name.rpartition("__")[2]


def _writes(case: str, kept: str) -> bool:
    """Return whether an op writes that part of the drafts; a commit reads them."""
    op = case.partition(" ")[0]
    is_of_conv = kept.startswith("conv")
    return op == "verify_step" or op == ("conv1d_verify" if is_of_conv else "mtp_verify")


@every_tensor
def test_what_is_not_a_tensor_is_refused(case: str, name: str) -> None:
    call = call_of(case)

    message = refusal(case, replaced(call, **{name: leaves(call)[name].tolist()}))

    assert _own(name) in message
    assert "list" in message


@every_tensor
def test_a_wrong_dtype_is_refused(case: str, name: str) -> None:
    call = call_of(case)
    given = leaves(call)[name]
    other = {torch.int32: torch.float32, torch.int64: torch.float32, torch.bool: torch.int8}
    wrong = given.to(other.get(given.dtype, torch.int16))

    message = refusal(case, replaced(call, **{name: wrong}))

    assert f"{_own(name)} has dtype {wrong.dtype}, needs torch." in message


@every_tensor
def test_a_tensor_on_another_device_is_refused(case: str, name: str) -> None:
    call = call_of(case)

    message = refusal(case, replaced(call, **{name: leaves(call)[name].to("meta")}))

    assert f"{_own(name)} is on meta, needs cpu" in message


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (case, name)
        for case, name in TENSORS
        # a verify's state_indices name the protocol by their axes, a commit's pool its layers
        if not (case not in PREFILLS and name == "metadata__state_indices")
        if not (case in COMMITS and name.startswith("pool"))
    ],
)
def test_a_wrong_rank_is_refused(case: str, name: str) -> None:
    call = call_of(case)
    wrong = leaves(call)[name][None]

    message = refusal(case, replaced(call, **{name: wrong}))

    assert _own(name) in message
    assert shape_text(wrong.shape) in message


@pytest.mark.parametrize(
    ("case", "name"),
    # with fewer offsets or accepted drafts the batch is a smaller one
    [
        (case, name)
        for case, name in TENSORS
        if _own(name) not in ("cu_seqlens", "last_accepted")
        if not (case in COMMITS and name == "metadata__state_indices")
    ],
)
def test_an_axis_that_is_too_short_is_refused(case: str, name: str) -> None:
    call = call_of(case)
    wrong = leaves(call)[name][..., :-1]

    message = refusal(case, replaced(call, **{name: wrong}))

    assert _own(name) in message
    assert shape_text(wrong.shape) in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", [case for case in CASES if "a" in call_of(case)])
def test_a_and_b_may_have_any_floating_dtype(case: str, dtype: torch.dtype) -> None:
    call = call_of(case)
    wider = {name: call[name].to(dtype) for name in ("a", "b")}

    results = [run(case, each) for each in (replaced(call_of(case), **wider), call)]

    torch.testing.assert_close(*results, rtol=0, atol=0)


@_tensors("x", "mixed_qkv", "q", "k", "v", "g", "beta", "conv_state", "state", "checkpoint_state")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_float_of_another_precision_is_refused(case: str, name: str, dtype: torch.dtype) -> None:
    call = call_of(case)

    message = refusal(case, replaced(call, **{name: leaves(call)[name].to(dtype)}))

    assert f"{_own(name)} has dtype {dtype}, needs torch." in message


@pytest.mark.parametrize(
    ("case", "name"),
    [
        *((case, name) for case, name in TENSORS if name in ("q", "k", "v", "gate", "state")),
        *((case, name) for case, name in TENSORS if name in ("pool__state", "checkpoint_state")),
    ],
)
def test_the_last_axis_of_vectors_and_states_must_be_contiguous(case: str, name: str) -> None:
    call = call_of(case)
    wrong = strided(leaves(call)[name])

    message = refusal(case, replaced(call, **{name: wrong}))

    assert f"{_own(name)} has strides {wrong.stride()}, needs " in message
    assert "contiguous" in message


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (case, name)
        for case, name in TENSORS
        if name in ("out", "state", "conv_state", "checkpoint_state")
        or name.startswith(("pool__", "deferred__"))
        or (name.startswith("drafts__") and _writes(case, _own(name)))
    ],
)
def test_what_is_written_must_not_be_expanded(case: str, name: str) -> None:
    call = call_of(case)
    given = leaves(call)[name]
    wrong = given[:1].clone().expand(given.shape)

    message = refusal(case, replaced(call, **{name: wrong}))

    assert f"{_own(name)} has strides {wrong.stride()}, needs memory for each element" in message


@_tensors("state", "conv_state", "pool__state", "pool__conv_state", "out")
def test_what_is_written_must_not_overlap_itself(case: str, name: str) -> None:
    call = call_of(case)
    given = leaves(call)[name]
    step = given.stride(0) - 1
    wrong = torch.zeros(given.numel(), dtype=given.dtype).as_strided(
        given.shape, (step, *given.stride()[1:])
    )

    message = refusal(case, replaced(call, **{name: wrong}))

    assert f"{_own(name)} has strides {wrong.stride()}, needs memory for each element" in message


@pytest.mark.parametrize("case", STEPS)
def test_the_two_pools_may_not_share_memory(case: str) -> None:
    call = call_of(case)
    state = leaves(call)["pool__state"]
    windows = leaves(call)["pool__conv_state"]
    page = torch.zeros(NUM_SLOTS, state[0].numel() + windows[0].numel())
    shared = page[:, : state[0].numel()].view_as(state)
    columns = page[:, state[0].numel() - 1 : -1].view(windows.dtype)[:, : windows[0].numel()]

    message = refusal(
        case,
        replaced(call, pool__state=shared, pool__conv_state=columns.view(windows.shape)),
    )

    assert "conv_state shares memory with state, needs memory of its own" in message


@pytest.mark.parametrize("case", STEPS)
@pytest.mark.parametrize("part", ["state", "conv_state"])
def test_an_output_in_a_pool_is_refused(case: str, part: str) -> None:
    call = call_of(case)
    out, into = call["out"], leaves(call)[f"pool__{part}"]
    wrong = into.view(-1)[-out.numel() :].view(out.shape)

    message = refusal(case, replaced(call, out=wrong))

    assert f"out shares memory with {part}, needs memory of its own" in message


@pytest.mark.parametrize("case", [*STEPS, "gated_rms_norm"])
@pytest.mark.parametrize("eps", [None, "1e-6", -1.0, float("nan")])
def test_an_epsilon_is_a_number_of_at_least_0(case: str, eps: object) -> None:
    name = "eps" if case == "gated_rms_norm" else "params__norm_eps"

    message = refusal(case, replaced(call_of(case), **{name: eps}))

    assert f"eps is {eps!r}, needs a number of at least 0" in message


@_tensors("state_indices", "out_state_indices", "checkpoint_indices")
@pytest.mark.parametrize("slot", [NUM_SLOTS, 2**31 - 1])
def test_a_slot_out_of_range_is_refused(case: str, name: str, slot: int) -> None:
    call = call_of(case)
    wrong = leaves(call)[name].clone()
    wrong.view(-1)[0] = slot

    message = refusal(case, replaced(call, **{name: wrong}))

    assert f"{_own(name)}[0]" in message
    assert f"is {slot}, needs a slot below {NUM_SLOTS}, or -1 or less for padding" in message


@pytest.mark.parametrize("case", [*DECODES, *REPLAYS, *COMMITS, *PREFILLS])
def test_two_rows_may_not_write_one_slot(case: str) -> None:
    call = call_of(case)
    inner = "metadata__" if "metadata" in call else ""
    has_target = f"{inner}out_state_indices" in leaves(call)
    name = f"{inner}{'out_' if has_target else ''}state_indices"
    name = "out_state_indices" if case in COMMITS else name

    message = refusal(case, replaced(call, **{name: slots(7, 7)}))

    assert "rows 0 and 1 both write slot 7, needs one writer a slot" in message


@pytest.mark.parametrize("case", [*DECODES, *COMMITS, *PREFILLS])
def test_a_row_may_not_read_what_another_writes(case: str) -> None:
    call = call_of(case)
    inner = "metadata__" if case in PREFILLS else ""
    first = leaves(call).get("state_indices", leaves(call).get("metadata__state_indices"))[0]
    targets = slots(7, first)

    message = refusal(case, replaced(call, **{f"{inner}out_state_indices": targets}))

    assert f"row 0 reads slot {first}, which row 1 writes: needs separate slots" in message


@pytest.mark.parametrize("part", ["conv_state", "state"])
@pytest.mark.parametrize("case", STEPS)
def test_a_step_needs_both_pools(case: str, part: str) -> None:
    message = refusal(case, replaced(call_of(case), **{f"pool__{part}": None}))

    assert f"pool.{part} is None, needs a " in message


@pytest.mark.parametrize("case", DEFERRED)
@pytest.mark.parametrize("name", ["num_deferred", "flush"])
def test_what_is_deferred_is_given_with_its_count(case: str, name: str) -> None:
    call = call_of(case)
    others = {other: None for other in ("num_deferred", "flush") if other != name}

    message = refusal(case, replaced(call, deferred=None, **others))

    assert f"{name} is given and deferred is None, needs DeferredUpdates with it" in message


@pytest.mark.parametrize("case", DEFERRED)
@pytest.mark.parametrize("count", [-1, 4])
def test_no_more_is_deferred_than_there_is_room_for(case: str, count: int) -> None:
    message = refusal(case, replaced(call_of(case), num_deferred=slots(count, 0)))

    assert f"num_deferred[0] is {count}, needs 0 to 3" in message


@pytest.mark.parametrize("case", DEFERRED)
def test_the_count_of_padding_may_be_any(case: str) -> None:
    call = replaced(call_of(case), state_indices=slots(-1, 4), num_deferred=slots(99, 0))

    assert run(case, call)[0].eq(0).all()


@pytest.mark.parametrize("case", STEPS)
def test_a_gate_needs_a_norm_weight(case: str) -> None:
    message = refusal(case, replaced(call_of(case), params__norm_weight=None))

    assert "gate is given and params.norm_weight is None, needs both or neither" in message


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (case, name)
        for case, name in TENSORS
        if "__" not in name and name not in ("bias", "out", "gate", "checkpoint_state")
        if name not in ("out_state_indices", "num_deferred", "flush")
    ],
)
def test_a_tensor_that_is_needed_may_not_be_none(case: str, name: str) -> None:
    message = refusal(case, replaced(call_of(case), **{name: None}))

    assert name in message
    assert "None" in message


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (case, name)
        for case in CASES
        for name in ("pool", "params", "metadata", "drafts")
        if name in call_of(case)
    ],
)
def test_a_group_of_tensors_of_the_wrong_class_is_refused(case: str, name: str) -> None:
    message = refusal(case, {**call_of(case), name: (torch.zeros(2), torch.zeros(2))})

    assert name in message
    assert "tuple" in message


@pytest.mark.parametrize("case", [*PREFILLS, "plan_prefill"])
@pytest.mark.parametrize("other", ["conv1d_verify table", "conv1d_verify replay"])
def test_a_prefill_refuses_the_metadata_of_a_verify(case: str, other: str) -> None:
    message = refusal(case, {**call_of(case), "metadata": call_of(other)["metadata"]})

    assert "metadata is a VerifyMetadata, needs " in message


@pytest.mark.parametrize("case", [*REPLAYS, *SNAPSHOTS, *TABLES, *COMMITS])
def test_a_verify_or_commit_refuses_the_metadata_of_a_prefill(case: str) -> None:
    message = refusal(case, {**call_of(case), "metadata": call_of("plan_prefill")["metadata"]})

    assert "metadata is a PrefillMetadata, needs " in message


@pytest.mark.parametrize(
    ("case", "needed"),
    [
        *((case, "needs (2, 4) [B, HV]") for case in ("recurrent_decode", "decode_step")),
        *((case, "needs (6, 4) [T, HV]") for case in ("prefill_step", "verify_step table")),
    ],
)
def test_a_shape_is_told_in_the_letters_of_the_op(case: str, needed: str) -> None:
    message = refusal(case, replaced(call_of(case), a=torch.zeros(6, 5)))

    assert f"a has shape (6, 5), {needed}" in message


@pytest.mark.parametrize(
    ("positional", "problem"),
    [
        (5, f"missing a required {KEYWORD}argument: 'state_indices'"),
        (6, "too many positional arguments"),
    ],
)
def test_arguments_that_do_not_fit_the_signature_are_told_what_does(
    positional: int, problem: str
) -> None:
    taken = "(mixed_qkv, a, b, params, pool, *, state_indices, out_state_indices=None, "

    with pytest.raises(TypeError) as raised:
        bind(SPEC, "cpu").decode_step(*[None] * positional)

    assert str(raised.value).startswith(f"decode_step: {problem}; it takes {taken}")


@pytest.mark.parametrize("case", CASES)
def test_without_checks_no_argument_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    looked_at: list[Any] = []
    monkeypatch.setattr(checks, "_check", lambda *args: looked_at.append(args))
    unchecked, checked = bind(SPEC, "cpu", check=False), bind(SPEC, "cpu", check=True)
    op = case.partition(" ")[0]

    getattr(unchecked, op)(**call_of(case))
    before = len(looked_at)
    getattr(checked, op)(**call_of(case))

    assert before == 0
    assert len(looked_at) == 1


def test_on_a_cpu_checks_are_on_unless_they_are_declined() -> None:
    call = replaced(call_of("conv1d_update"), state_indices=slots(1))

    with pytest.raises(InputError, match="state_indices is"):
        bind(SPEC, "cpu").conv1d_update(**call)


def test_a_refused_call_can_be_made_again_in_order() -> None:
    call, twin = call_of("decode_step"), call_of("decode_step")
    expected = run("decode_step", twin)

    refusal("decode_step", replaced(call, state_indices=slots(NUM_SLOTS, 4)))

    assert torch.equal(run("decode_step", call), expected)
    assert all(
        torch.equal(one.nan_to_num(), other.nan_to_num())
        for one, other in zip(_pools(call), _pools(twin), strict=True)
    )


def _pools(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return call["pool"].conv_state, call["pool"].state


def test_an_engines_mistake_is_also_a_value_error() -> None:
    spec: GdnSpec = SPEC

    with pytest.raises(ValueError, match="A_log has shape"):
        bind(spec, "cpu").gating(**replaced(call_of("gating"), A_log=torch.zeros(5)))
