# SPDX-License-Identifier: Apache-2.0
"""AMD's backend: who serves on which GPU, and aiter's functions held to the contract."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from gdn_backend_rocm import AITER_KERNELS, aiter_conv1d, aiter_decode, aiter_prefill

from gdn_portable import (
    Choice,
    ConvLayout,
    DeferredUpdates,
    Device,
    GdnOps,
    GdnSpec,
    Op,
    StateLayout,
    UnsupportedCallError,
    UnsupportedError,
    bind,
    explain,
    reference,
    select,
)
from gdn_portable.testing import cases
from gdn_portable.warmup import warmup
from tests import fake_aiter
from tests.calls import Call, call_of, replaced
from tests.cases import assert_identical, copies, slots
from tests.command import Command
from tests.fake_aiter import RELEASES, write_namesake, write_release

if TYPE_CHECKING:
    from ci.amdgcn import Simulator

MI300X = Device("rocm", "gfx942")
MI355X = Device("rocm", "gfx950")
# Qwen3.5's largest on two ranks: every aiter kernel can do it
LAYER = GdnSpec(
    num_k_heads=8,
    num_v_heads=32,
    head_k_dim=128,
    head_v_dim=128,
    dtype=torch.bfloat16,
    state_dtype=torch.bfloat16,
)
SMALL = replace(LAYER, num_k_heads=1, num_v_heads=2, state_dtype=torch.float32)
FUNCTIONS = (
    aiter_decode.FLYDSL_GDR_DECODE,
    aiter_decode.GDR_DECODE_PACKED_BF16,
    aiter_conv1d.CAUSAL_CONV1D_UPDATE,
    aiter_prefill.CHUNK_GATED_DELTA_RULE_OPT_VK,
    aiter_prefill.BUILD_PREFILL_METADATA,
)
NAMES = [kernel.name for kernel in AITER_KERNELS]
PREFILL = {
    Op.CHUNK_PREFILL: "aiter.chunk_gated_delta_rule_opt_vk",
    Op.PLAN_PREFILL: "aiter.plan_prefill",
}
WITHOUT_BLOCK_POINTERS = "triton is 3.9.0, without the block pointers of aiter's kernels"

Install = Callable[[Callable[[Path], None]], None]


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(select.OVERRIDE_VARIABLE, raising=False)
    monkeypatch.setattr(aiter_prefill, "installed_triton", lambda: ("triton", "3.6.0"))


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Install]:
    """Return what puts a package of the name aiter on the path."""

    def put(write: Callable[[Path], None]) -> None:
        write(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)

    _forget_aiter()
    fake_aiter.CALLS.clear()
    yield put
    _forget_aiter()


@pytest.fixture
def aiter(install: Install) -> None:
    """Install the release that every adapter is written for."""
    install(lambda folder: write_release(folder, "0.1.20"))


def _forget_aiter() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("aiter", "flydsl")]:
        del sys.modules[name]


def _reasons(device: Device = MI355X, spec: GdnSpec = LAYER) -> dict[str, str]:
    """Return what speaks against each kernel of aiter."""
    choices = explain(spec, device)
    return {c.kernel: "; ".join(c.reasons) for c in choices if c.kernel in NAMES}


def _all(reason: str) -> dict[str, str]:
    return dict.fromkeys(NAMES, reason)


def _serving(choices: tuple[Choice, ...]) -> Mapping[Op, str]:
    return {choice.op: choice.kernel for choice in choices if choice.chosen}


@pytest.mark.parametrize("device", [MI300X, MI355X], ids=str)
def test_an_amd_gpu_is_served_by_the_shared_kernels(device: Device) -> None:
    kernels = bind(SMALL, device, check=False).kernels

    assert kernels == {op: f"triton.{op.value}" for op in Op}
    assert select.default_backend(device) == "rocm"


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("gfx90a", "no kernel was compiled, simulated or run for the MI200 series"),
        ("gfx1030", "waves of 32 lanes and no MFMA"),
        ("gfx1100", "waves of 32 lanes and no MFMA"),
        ("gfx1201", "waves of 32 lanes and no MFMA"),
    ],
)
def test_another_amd_gpu_is_refused_with_a_reason(arch: str, reason: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        bind(SMALL, Device("rocm", arch))

    reasons = caught.value.rejected["triton.recurrent_decode"]
    assert reasons[0] == f"arch is {arch}, needs gfx942 or gfx950"
    assert reason in reasons[1]


def test_a_layer_that_the_shared_kernels_refuse_keeps_their_reason() -> None:
    choices = explain(replace(SMALL, conv_width=5), MI300X)

    refused = {c.reasons for c in choices if c.kernel == "triton.conv1d_update"}
    assert refused == {("conv_width is 5, needs 2 to 4",)}


def test_without_aiter_its_kernels_say_so(install: Install) -> None:
    install(lambda folder: None)
    if importlib.util.find_spec("aiter") is not None:
        pytest.skip("a module of the name aiter is installed")

    assert _reasons() == _all("AMD's aiter (amd-aiter) is not installed")


def test_another_project_of_the_name_is_told_from_amds(install: Install) -> None:
    install(write_namesake)

    assert _reasons() == _all("module 'aiter' is another project's, needs AMD's (amd-aiter)")


def test_an_old_aiter_is_told_by_its_signatures(install: Install) -> None:
    install(lambda folder: write_release(folder, "0.1.16"))

    prefill = (
        "chunk_gated_delta_rule_opt_vk of aiter 0.1.16 takes no prefill_metadata, needs "
        "v0.1.19.post2 or newer"
    )
    assert _reasons() == {
        "aiter.flydsl_gdr_decode": (
            "flydsl_gdr_decode of aiter 0.1.16 takes no read_indices, write_indices, needs v0.1.20 "
            "or newer"
        ),
        "aiter.gdr_decode_packed_bf16": (
            "aiter 0.1.16 has no ops.gdr_decode_packed_bf16.gdr_decode_packed_bf16, needs v0.1.20 "
            "or newer"
        ),
        "aiter.causal_conv1d_update": (
            "aiter 0.1.16 has no ops.causal_conv1d_update.causal_conv1d_update, needs v0.1.17 or "
            "newer"
        ),
        "aiter.chunk_gated_delta_rule_opt_vk": prefill,
        "aiter.plan_prefill": prefill,
    }


@pytest.mark.usefixtures("aiter")
def test_a_new_aiter_is_able_and_serves_only_where_it_is_named() -> None:
    assert _reasons() == _all("")
    assert set(_serving(explain(LAYER, MI355X)).values()).isdisjoint(NAMES)

    named = {kernel.op: kernel.name for kernel in AITER_KERNELS}
    ops = bind(LAYER, MI355X, kernels=named, check=False)

    assert {op: ops.kernels[op] for op in named} == named


@pytest.mark.parametrize("op", [Op.RECURRENT_DECODE, Op.CHUNK_PREFILL], ids=lambda op: op.value)
@pytest.mark.usefixtures("aiter")
def test_tiles_by_the_batch_are_not_deterministic(op: Op) -> None:
    named = next(kernel.name for kernel in AITER_KERNELS if kernel.op is op)

    with pytest.raises(UnsupportedError, match="takes its tiles by the batch"):
        bind(LAYER, MI300X, kernels={op: named}, deterministic=True)


@pytest.mark.usefixtures("aiter")
def test_warmup_runs_what_aiter_can_do_and_passes_over_the_rest() -> None:
    named = {"recurrent_decode": "aiter.flydsl_gdr_decode"}
    calls = {"conv1d_update": "aiter.causal_conv1d_update", "decode_step": "composed.decode_step"}
    others = {op.value: f"reference.{op.value}" for op in Op if not op.value.endswith("step")}
    ops = bind(SMALL, MI300X, kernels={**others, **named, **calls}, check=False)
    launchers = {op: getattr(ops, op.value) for op in Op}
    launchers |= {Op.PREFILL_STEP: _nothing, Op.VERIFY_STEP: _nothing}

    warmup(SMALL, Device("cpu"), launchers, batch_sizes=(2,), prefill_tokens=())

    assert {"flydsl_gdr_decode", "causal_conv1d_update"} == fake_aiter.CALLS


def _nothing(*args: object, **kwargs: object) -> None:
    return None


@pytest.mark.usefixtures("aiter")
def test_aiter_is_named_for_a_step_by_composing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    override = "recurrent_decode=aiter.flydsl_gdr_decode,decode_step=composed.decode_step"
    monkeypatch.setenv(select.OVERRIDE_VARIABLE, override)

    ops = bind(LAYER, MI300X, check=False)

    assert ops.decode_step.keywords["recurrent_decode"] is ops.recurrent_decode  # type: ignore[attr-defined]
    assert ops.kernels[Op.CONV1D_UPDATE] == "triton.conv1d_update"


def test_explaining_imports_no_aiter(install: Install) -> None:
    breaks = "raise AssertionError('imported')\n"
    install(lambda folder: write_release(folder, "0.1.20", imports=breaks))

    assert _reasons() == _all("")
    assert "aiter" not in sys.modules


def test_what_aiter_needs_itself_is_probed(
    install: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(lambda folder: write_release(folder, "0.1.20"))
    (tmp_path / "flydsl").rename(tmp_path / "other")
    importlib.invalidate_caches()
    monkeypatch.setattr(aiter_prefill, "installed_triton", lambda: ("triton", "3.9.0"))

    assert _reasons() == {
        **_all(""),
        "aiter.flydsl_gdr_decode": (
            "flydsl, which flydsl_gdr_decode of aiter needs, is not installed"
        ),
        **dict.fromkeys(PREFILL.values(), WITHOUT_BLOCK_POINTERS),
    }


@pytest.mark.parametrize(
    ("kernel", "spec", "reason"),
    [
        (
            "aiter.flydsl_gdr_decode",
            replace(LAYER, dtype=torch.float16),
            "float16 activations with a bfloat16 state",
        ),
        ("aiter.flydsl_gdr_decode", replace(LAYER, scale=0.5), "scale is 0.5, needs K ** -0.5"),
        (
            "aiter.flydsl_gdr_decode",
            replace(LAYER, state_layout=StateLayout.KV),
            "state layout is KV, needs VK",
        ),
        ("aiter.gdr_decode_packed_bf16", SMALL, "heads (H, HV) are (1, 2), needs (8, 32)"),
        (
            "aiter.gdr_decode_packed_bf16",
            replace(LAYER, qk_l2norm=False),
            "qk_l2norm is False, and the kernel always normalises",
        ),
        ("aiter.causal_conv1d_update", replace(LAYER, conv_window=6), "conv_window is 6, needs"),
        (
            "aiter.causal_conv1d_update",
            replace(LAYER, conv_dtype=torch.float32),
            "conv dtype is torch.float32, needs that of the activations",
        ),
        ("aiter.causal_conv1d_update", replace(LAYER, conv_width=5), "conv_width is 5, needs 2"),
        (
            "aiter.chunk_gated_delta_rule_opt_vk",
            replace(LAYER, state_dtype=torch.float16),
            "state dtype is torch.float16, needs",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.usefixtures("aiter")
def test_what_an_aiter_kernel_cannot_do_is_a_reason(
    kernel: str, spec: GdnSpec, reason: str
) -> None:
    assert reason in _reasons(spec=spec)[kernel]


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda folder: None, "AMD's aiter (amd-aiter) is not installed"),
        (write_namesake, "module 'aiter' is another project's, needs AMD's (amd-aiter)"),
        (
            lambda folder: write_release(folder, "0.1.16"),
            "flydsl_gdr_decode of aiter 0.1.16 takes no read_indices, write_indices, needs v0.1.20 "
            "or newer",
        ),
        (lambda folder: write_release(folder, "0.1.20"), None),
    ],
    ids=["none", "another project's", "old", "new"],
)
def test_doctor_explains_aiter(
    install: Install, command: Command, write: Callable[[Path], None], said: str | None
) -> None:
    install(write)

    document = command.document("doctor", "--arch", "gfx942")

    decodes = [c for c in document["backends"]["rocm"] if c["op"] == "recurrent_decode"]
    reasons = {choice["kernel"]: choice["reasons"] for choice in decodes}
    assert [choice["kernel"] for choice in decodes if choice["chosen"]] == [
        "triton.recurrent_decode"
    ]
    assert reasons["aiter.flydsl_gdr_decode"] == ([] if said is None else [said])
    assert document["default_backend"] == "rocm"


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
def test_the_recorded_release_takes_what_is_passed(function: Any, install: Install) -> None:
    files = RELEASES["0.1.20"][f"{function.module.replace('.', '/')}.py"]
    names = {part.strip().partition("=")[0] for part in files[function.name].split(",")}

    assert set(function.parameters) <= names


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
def test_an_installed_aiter_takes_what_is_passed(function: Any) -> None:
    if importlib.util.find_spec("aiter") is None:
        pytest.skip("AMD's aiter is not installed")

    assert replace(function, libraries=()).missing() is None


def _bound(spec: GdnSpec, device: Device, **kernels: str) -> GdnOps:
    """Bind aiter's kernels as on a GPU, for tensors on the CPU."""
    ops = bind(spec, device, kernels=kernels, check=False)
    return replace(ops, device=Device("cpu", "cpu"))


def _call(case: str, spec: GdnSpec, **changes: Any) -> Call:
    """Return a call whose sequences 1 to 3 are padding, live and padding by a far number."""
    op_slots = {"state_indices": slots(-1, 4, -7), "out_state_indices": None}
    call = call_of(case, spec)
    rows = {name: call[name][:1].repeat_interleave(3, 0) for name in _per_row(case)}
    call |= rows | op_slots
    if "dt_bias" in call:
        call["dt_bias"] = call["dt_bias"].to(spec.dtype)
        call["A_log"] = call["A_log"].float()
        call["a"], call["b"] = call["a"].to(spec.dtype), call["b"].to(spec.dtype)
    return replaced(call, **changes)


def _per_row(case: str) -> tuple[str, ...]:
    return ("x", "out") if case == "conv1d_update" else ("q", "k", "v", "a", "b", "out")


def _assert_like_the_reference(op: str, ops: GdnOps, call: Call) -> None:
    expected = copies(call)
    want = getattr(reference, op)(ops.spec, **expected)

    got = getattr(ops, op)(**call)

    assert got is call["out"]
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
    state = "conv_state" if op == "conv1d_update" else "state"
    torch.testing.assert_close(call[state], expected[state], rtol=0.02, atol=0.02, equal_nan=True)


@pytest.mark.parametrize("pad_slot", [-1, 0])
@pytest.mark.usefixtures("aiter")
def test_flydsl_decode_obeys_the_padding_law(pad_slot: int) -> None:
    spec = replace(SMALL, pad_slot=pad_slot)
    ops = _bound(spec, MI300X, recurrent_decode="aiter.flydsl_gdr_decode")
    call = _call("recurrent_decode", spec, state_indices=slots(pad_slot, 4, -7))

    _assert_like_the_reference("recurrent_decode", ops, call)
    assert call["out"][[0, 2]].eq(0).all()


@pytest.mark.usefixtures("aiter")
def test_flydsl_decode_computes_where_it_may_not_write() -> None:
    spec = replace(SMALL, scratch_slot=2)
    ops = _bound(spec, MI300X, recurrent_decode="aiter.flydsl_gdr_decode")
    indices = {"state_indices": slots(1, 4, -1), "out_state_indices": slots(-1, 5, 6)}
    call = _call("recurrent_decode", spec, **indices)
    before, expected = copies(call), copies(call)
    want = reference.recurrent_decode(spec, **expected)

    got = ops.recurrent_decode(**call)

    torch.testing.assert_close(got, want)
    torch.testing.assert_close(call["state"][5], expected["state"][5])
    others = [0, 1, 3, 4, 6, 7]
    assert_identical(call["state"][others], before["state"][others])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dt_bias": torch.zeros(2)}, "dt_bias has dtype torch.float32, needs torch.bfloat16"),
        ({"out_state_indices": slots(1, 2, 3)}, "needs a scratch_slot"),
        ({"state": torch.zeros(8, 2, 128, 128).mT}, "needs K contiguous"),
    ],
    ids=["dt_bias", "other slots", "strides"],
)
@pytest.mark.usefixtures("aiter")
def test_flydsl_decode_refuses_what_it_would_get_wrong(
    changes: dict[str, Any], reason: str
) -> None:
    ops = _bound(SMALL, MI300X, recurrent_decode="aiter.flydsl_gdr_decode")

    with pytest.raises(UnsupportedCallError, match=reason):
        ops.recurrent_decode(**_call("recurrent_decode", SMALL, **changes))


@pytest.mark.parametrize(
    ("kernel", "spec", "device"),
    [("flydsl_gdr_decode", SMALL, MI300X), ("gdr_decode_packed_bf16", LAYER, MI355X)],
)
@pytest.mark.usefixtures("aiter")
def test_a_decode_that_writes_every_state_is_not_told_to_defer(
    kernel: str, spec: GdnSpec, device: Device
) -> None:
    ops = _bound(spec, device, recurrent_decode=f"aiter.{kernel}")
    deferred = DeferredUpdates.allocate(spec, 8, 2, "cpu")

    with pytest.raises(UnsupportedCallError, match="deferred is given: the kernel writes every"):
        ops.recurrent_decode(**_call("recurrent_decode", spec), deferred=deferred)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [3, 4], ids=["contiguous", "strided"])
@pytest.mark.usefixtures("aiter")
def test_flydsl_decode_writes_any_out(dtype: torch.dtype, width: int) -> None:
    ops = _bound(SMALL, MI300X, recurrent_decode="aiter.flydsl_gdr_decode")
    out = torch.full((3, width, 2, 128), torch.nan, dtype=dtype)[:, width - 3]

    call = _call("recurrent_decode", SMALL, out=out)

    _assert_like_the_reference("recurrent_decode", ops, call)


@pytest.mark.parametrize("source", ["one tensor", "one tensor in another order", "three"])
@pytest.mark.usefixtures("aiter")
def test_packed_decode_takes_parts_of_one_tensor_and_of_several(source: str) -> None:
    ops = _bound(LAYER, MI355X, recurrent_decode="aiter.gdr_decode_packed_bf16")
    call = _call("recurrent_decode", LAYER)
    whole = torch.cat([call[name].flatten(1) for name in "qkv"], dim=1)
    q, k, v = whole.split(LAYER.conv_groups, dim=1)
    if source == "one tensor in another order":
        k, q, v = torch.cat((k, q, v), dim=1).split(LAYER.conv_groups, dim=1)
    views = [q.unflatten(1, (8, 128)), k.unflatten(1, (8, 128)), v.unflatten(1, (32, 128))]
    if source == "three":
        views = [x.contiguous() for x in views]

    seen = aiter_decode.packed(*views)

    assert torch.equal(seen, whole)
    assert (seen.data_ptr() == whole.data_ptr()) is (source == "one tensor")
    call |= dict(zip("qkv", views, strict=True))
    _assert_like_the_reference("recurrent_decode", ops, call)


@pytest.mark.parametrize("layout", ConvLayout, ids=lambda layout: layout.value)
@pytest.mark.parametrize("aliased", [False, True], ids=["out", "in place"])
@pytest.mark.usefixtures("aiter")
def test_conv_update_obeys_the_padding_law(layout: ConvLayout, aliased: bool) -> None:
    spec = replace(SMALL, conv_layout=layout)
    ops = _bound(spec, MI300X, conv1d_update="aiter.causal_conv1d_update")
    call = _call("conv1d_update", spec)
    call["bias"] = call["bias"].to(call["weight"].dtype)
    if aliased:
        call["out"] = call["x"]
    turned = layout is ConvLayout.LEN_FIRST
    expected = copies(call)
    window = expected["conv_state"].mT if turned else expected["conv_state"]
    want = reference.conv1d_update(spec, **{**expected, "conv_state": window})

    got = ops.conv1d_update(**call)

    assert got is call["out"]
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
    torch.testing.assert_close(call["conv_state"], expected["conv_state"], equal_nan=True)
    assert got[[0, 2]].eq(0).all()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"out_state_indices": slots(1, 2, 3)}, "is given: the kernel works in place"),
        ({"bias": torch.zeros(512, dtype=torch.float64)}, "bias has dtype torch.float64, needs"),
        (
            {"conv_state": torch.empty_strided((8, 512, 3), (2**29, 3, 1), device="meta")},
            "conv_state spans 8 slots of 536870912 elements, needs less than 4294967296 in all",
        ),
    ],
    ids=["other slots", "bias", "32 bits"],
)
@pytest.mark.usefixtures("aiter")
def test_conv_update_refuses_what_it_would_get_wrong(changes: dict[str, Any], reason: str) -> None:
    ops = _bound(SMALL, MI300X, conv1d_update="aiter.causal_conv1d_update")

    with pytest.raises(UnsupportedCallError, match=reason):
        ops.conv1d_update(**_call("conv1d_update", SMALL, **changes))


@pytest.mark.parametrize("layout", StateLayout, ids=lambda layout: layout.value)
@pytest.mark.parametrize("name", ["prefill", "prefill with a gate and no flags"])
@pytest.mark.usefixtures("aiter")
def test_chunk_prefill_passes_the_cases(amd_gpu: Simulator, name: str, layout: StateLayout) -> None:
    spec = replace(SMALL, state_layout=layout)
    case = next(case for case in cases(spec) if case.name == f"rule of {name}")
    ops = _bound(case.spec, MI300X, **{op.value: kernel for op, kernel in PREFILL.items()})

    case.check(ops)

    assert [launch.kernel for launch in amd_gpu.launches] == ["_commit_snapshots"]


@pytest.mark.usefixtures("aiter")
def test_chunk_prefill_does_without_a_plan_of_another_maker(amd_gpu: Simulator) -> None:
    ops = _bound(SMALL, MI300X, **{op.value: kernel for op, kernel in PREFILL.items()})
    call = call_of("chunk_prefill", SMALL)
    metadata = replace(call["metadata"], checkpoint_offsets=None, checkpoint_indices=None)
    metadata.plan = object()
    call |= {"metadata": metadata, "checkpoint_state": None}
    want = reference.chunk_prefill(
        SMALL, **copies({**call, "metadata": replace(metadata, plan=None)})
    )

    torch.testing.assert_close(ops.chunk_prefill(**call), want, rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("aiter")
def test_chunk_prefill_uses_the_plan_of_the_step(amd_gpu: Simulator) -> None:
    ops = _bound(SMALL, MI300X, **{op.value: kernel for op, kernel in PREFILL.items()})
    call = call_of("chunk_prefill", SMALL)
    metadata = replace(call["metadata"], checkpoint_offsets=None, checkpoint_indices=None)
    call |= {"metadata": metadata, "checkpoint_state": None}
    expected = copies(call)
    want = reference.chunk_prefill(SMALL, **expected)

    ops.plan_prefill(metadata)
    plan = metadata.plan
    got = ops.chunk_prefill(**call)

    assert metadata.plan is plan
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
    torch.testing.assert_close(call["state"], expected["state"], equal_nan=True)


@pytest.mark.usefixtures("aiter")
def test_chunk_prefill_refuses_checkpoints() -> None:
    ops = _bound(SMALL, MI300X, **{op.value: kernel for op, kernel in PREFILL.items()})

    with pytest.raises(UnsupportedCallError, match="checkpoint_offsets is given: "):
        ops.chunk_prefill(**call_of("chunk_prefill", SMALL))
