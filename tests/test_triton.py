# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels on a simulated GPU: unusual input, hard numbers, and what is refused."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from gdn_backend_triton import triton_is_missing
from torch import Tensor

from gdn_portable import (
    ConvLayout,
    Device,
    GdnOps,
    GdnSpec,
    InputError,
    Op,
    PrefillMetadata,
    StateLayout,
    StatePool,
    UnsupportedError,
    bind,
)
from gdn_portable.testing import Case
from gdn_portable.warmup import warmup
from tests import calls
from tests.calls import (
    CASES,
    COMMITS,
    DECODES,
    PREFILLS,
    REPLAYS,
    SNAPSHOTS,
    TABLES,
    Call,
    call_of,
    leaves,
    replaced,
)
from tests.cases import (
    assert_identical,
    copies,
    generator,
    over_long,
    params,
    pool,
    random,
    slots,
    strided,
)
from tests.long_prefills import (
    assert_remembered,
    long_prefill,
    of_growing_states,
    of_unit_keys,
)

if TYPE_CHECKING:
    from ci.amdgcn import Simulator

SPEC = replace(calls.SPEC, head_k_dim=32, head_v_dim=16)
VERIFIES = (*REPLAYS, *SNAPSHOTS, *TABLES)
WITH_OUT = [case for case in CASES if "out" in call_of(case)]
ACTIVATIONS = ("x", "mixed_qkv", "a", "b", "g", "beta", "q", "k", "v", "gate")


def simulated(spec: GdnSpec = SPEC, *, deterministic: bool = False) -> GdnOps:
    from ci.amdgcn import bind_simulated

    return bind_simulated(spec, "gfx942", deterministic=deterministic)


def check(case: str, call: Call, spec: GdnSpec = SPEC) -> None:
    """Compare a call with the reference."""
    Case(case, Op(case.partition(" ")[0]), spec, call).check(simulated(spec))


def transposed(rows: Tensor) -> Tensor:
    """Return the same values as a transposed projection has them: tokens next to each other."""
    return rows.transpose(0, 1).contiguous().transpose(0, 1)


def sliced(rows: Tensor) -> Tensor:
    """Return the same values as a slice of a wider projection."""
    wide = torch.full((len(rows), *rows.shape[1:-1], rows.shape[-1] + 9), torch.nan).to(rows)
    wide[..., 3:-6] = rows
    return wide[..., 3:-6]


@pytest.mark.parametrize("form", [transposed, sliced])
@pytest.mark.parametrize("case", [case for case in CASES if case != "plan_prefill"])
def test_projections_may_be_transposed_or_slices(
    amd_gpu: Simulator, case: str, form: Callable[[Tensor], Tensor]
) -> None:
    call = call_of(case, SPEC)
    turned = {name: form(call[name]) for name in ACTIVATIONS if name in call}
    names = ("weight", "bias", "A_log", "dt_bias")
    parameters = {name: strided(call[name]) for name in names if name in call}

    check(case, {**call, **turned, **parameters})


@pytest.mark.parametrize("case", [*DECODES, *PREFILLS, *VERIFIES, *COMMITS])
def test_indices_may_be_strided_and_over_long(amd_gpu: Simulator, case: str) -> None:
    call = call_of(case, SPEC)
    indices = {
        name: strided(value if name.endswith("cu_seqlens") else over_long(value))
        for name, value in leaves(call).items()
        if value.dtype == torch.int32
    }

    check(case, replaced(call, **indices))


@pytest.mark.parametrize("case", WITH_OUT)
def test_an_output_may_be_strided_and_of_another_float(amd_gpu: Simulator, case: str) -> None:
    call = call_of(case, SPEC)
    wide = strided(torch.zeros(call["out"].shape, dtype=torch.float32))

    check(case, {**call, "out": wide})


@pytest.mark.parametrize(
    "case", ["conv1d_update", "gated_rms_norm", *(c for c in VERIFIES if c.startswith("conv"))]
)
def test_an_output_may_be_the_input(amd_gpu: Simulator, case: str) -> None:
    call, plain = call_of(case, SPEC), call_of(case, SPEC)
    op = getattr(simulated(), case.partition(" ")[0])

    got = op(**{**call, "out": call["x"]})

    assert got is call["x"]
    assert_identical(got, op(**plain))
    assert_identical({**call, "x": 0, "out": 0}, {**plain, "x": 0, "out": 0})


@pytest.mark.parametrize("case", [*DECODES, *PREFILLS, *VERIFIES])
def test_rows_of_zeros_have_no_direction_and_give_numbers(amd_gpu: Simulator, case: str) -> None:
    call = call_of(case, SPEC)
    names = [name for name in ("x", "mixed_qkv", "q", "k") if name in call]

    check(case, {**call, **{name: torch.zeros_like(call[name]) for name in names}})


@pytest.mark.parametrize("case", [*DECODES, *PREFILLS, *VERIFIES])
def test_a_batch_of_padding_gives_zeros_and_touches_nothing(amd_gpu: Simulator, case: str) -> None:
    call = call_of(case, SPEC)
    padded = {
        name: torch.full_like(value, -3)
        for name, value in leaves(call).items()
        if name.endswith("state_indices")
    }

    check(case, replaced(call, **padded))


@pytest.mark.parametrize("case", [*DECODES, *PREFILLS, *VERIFIES])
def test_an_empty_batch_gives_an_empty_output_and_touches_nothing(
    amd_gpu: Simulator, case: str
) -> None:
    call = call_of(case, SPEC)
    rows = ("x", "mixed_qkv", "a", "b", "g", "beta", "q", "k", "v", "gate")
    empty = {name: call[name][:0] for name in rows if name in call}
    nobody = {"metadata__cu_seqlens": slots(0)} if "metadata" in call else {}
    nobody |= {} if "metadata" in call else {"state_indices": slots(), "out_state_indices": slots()}
    before = copies(call)

    got = getattr(simulated(), case.partition(" ")[0])(
        **{**replaced({**call, **empty}, **nobody), "out": None}
    )

    assert got.shape == (0, *call["out"].shape[1:])
    assert_identical(call, before)


@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]], ids=["nobody", "empty sequences"])
@pytest.mark.parametrize("case", [*PREFILLS, *VERIFIES])
def test_rows_of_nobody_are_zero(amd_gpu: Simulator, case: str, offsets: list[int]) -> None:
    call = replaced(call_of(case, SPEC), metadata__cu_seqlens=slots(*offsets))
    unkept = {"metadata__checkpoint_offsets": slots(0, -1)} if case in PREFILLS else {}

    check(case, replaced(call, **unkept))


@pytest.mark.parametrize("case", ["conv1d_prefill", "chunk_prefill", "prefill_step"])
def test_empty_sequences_without_rows_store_their_initial_state(
    amd_gpu: Simulator, case: str
) -> None:
    call = replaced(
        call_of(case, SPEC),
        metadata__cu_seqlens=slots(0, 0, 0),
        metadata__has_initial_state=torch.tensor([True, False]),
        metadata__checkpoint_offsets=None,
        metadata__checkpoint_indices=None,
    )
    rows = ("x", "mixed_qkv", "a", "b", "g", "beta", "q", "k", "v", "gate", "out")

    check(case, {**call, **{name: call[name][:0] for name in rows if name in call}})


def test_checkpoints_of_a_prefill_may_go_to_a_tensor_of_their_own(amd_gpu: Simulator) -> None:
    ours, theirs = call_of("chunk_prefill", SPEC), call_of("chunk_prefill", SPEC)
    unwritten = torch.arange(calls.NUM_SLOTS) != 6

    simulated().chunk_prefill(**ours)
    bind(SPEC, "cpu").chunk_prefill(**theirs)

    kept, expected = ours["checkpoint_state"], theirs["checkpoint_state"]
    assert kept[unwritten].isnan().all()
    torch.testing.assert_close(kept[6], expected[6], rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "case", ["recurrent_decode", "chunk_prefill", "mtp_verify replay", "mtp_verify snapshot"]
)
def test_keys_that_are_not_normalised_are_used_as_they_are(amd_gpu: Simulator, case: str) -> None:
    spec = replace(SPEC, qk_l2norm=False, scale=0.37)
    call = call_of(case, spec)

    check(case, {**call, "k": call["k"] * 0.1}, spec)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("conv")])
def test_windows_hold_the_same_bits_in_either_layout(amd_gpu: Simulator, case: str) -> None:
    call, plain = call_of(case, SPEC), call_of(case, SPEC)
    names = [name for name in ("conv_state", "drafts__conv_state") if name in leaves(call)]
    turned = {name: leaves(call)[name].transpose(-1, -2).contiguous() for name in names}
    op = case.partition(" ")[0]

    got = getattr(simulated(replace(SPEC, conv_layout=ConvLayout.LEN_FIRST)), op)(
        **replaced(call, **turned)
    )

    assert torch.equal(got, getattr(simulated(), op)(**plain))
    for name, memory in turned.items():
        assert_identical(memory.transpose(-1, -2), leaves(plain)[name])


FAR = ("conv1d_prefill", "prefill_step", "decode_step", *COMMITS) + tuple(
    case for case in VERIFIES if case.startswith("verify_step")
)


def far_apart(near: Tensor) -> Tensor:
    """Return the same slots over 1 GiB apart; what lies between them is never touched."""
    stride = 2**29 + 64
    extent = stride * (len(near) - 1) + near[0].numel()
    memory = torch.empty(extent, dtype=near.dtype)
    return memory.as_strided(near.shape, (stride, *near[0].stride())).copy_(near)


@pytest.mark.parametrize("case", FAR)
def test_slots_may_be_gigabytes_apart(amd_gpu: Simulator, case: str) -> None:
    # slots from the fourth on are 2 ** 31 elements away
    spec = replace(SPEC, num_k_heads=1, num_v_heads=1, head_k_dim=16, state_dtype=torch.bfloat16)
    call, plain = call_of(case, spec), call_of(case, spec)
    names = ("conv_state", "state", "pool__conv_state", "pool__state", "drafts__conv_inputs")
    names += ("drafts__k", "drafts__state")
    far = {name: far_apart(leaves(call)[name]) for name in names if name in leaves(call)}
    op = getattr(simulated(spec), case.partition(" ")[0])

    got, expected = op(**replaced(call, **far)), op(**plain)

    assert got is expected is None or torch.equal(got, expected)
    for name, moved in far.items():
        assert_identical(moved, leaves(plain)[name])


@pytest.mark.parametrize("layout", StateLayout)
@pytest.mark.parametrize("gated", [False, True])
def test_a_deterministic_decode_does_not_depend_on_the_batch(
    amd_gpu: Simulator, layout: StateLayout, gated: bool
) -> None:
    spec, rng = replace(SPEC, state_layout=layout), generator()
    ops, weights = simulated(spec, deterministic=True), params(spec, rng)
    together = pool(spec, rng, 9, live=range(9))
    apart, wide = copies(together), random(rng, 5, spec.conv_dim + 8 + 64, dtype=spec.dtype)
    mixed, a, b, gate = wide.split([spec.conv_dim, 4, 4, 64], dim=1)
    where = slots(8, 0, 3, 5, 1)

    def step(states: StatePool, rows: slice) -> Tensor:
        return ops.decode_step(
            *(x[rows] for x in (mixed, a, b)),
            weights,
            states,
            state_indices=where[rows],
            gate=gate[rows] if gated else None,
        )

    rows = [step(apart, slice(i, i + 1)) for i in range(5)]

    assert torch.equal(step(together, slice(0, 5)), torch.cat(rows))
    assert_identical(together, apart)


def test_a_deterministic_prefill_does_not_depend_on_the_batch(amd_gpu: Simulator) -> None:
    rng, ops = generator(), simulated(deterministic=True)
    weights, together = params(SPEC, rng), pool(SPEC, rng, 4, live=range(4))
    alone = copies(together)
    mixed, ab = random(rng, 420, SPEC.conv_dim + 8, dtype=SPEC.dtype).split([SPEC.conv_dim, 8], 1)
    a, b = ab.split(4, dim=1)

    batch = PrefillMetadata(slots(0, 70, 400, 420), slots(1, 3, 0))
    company = ops.prefill_step(mixed, a, b, weights, together, metadata=batch)
    single = PrefillMetadata(slots(0, 330), slots(3))
    rows = (x[70:400] for x in (mixed, a, b))
    out = ops.prefill_step(*rows, weights, alone, metadata=single)

    assert torch.equal(company[70:400], out)
    assert_identical(together.state[3], alone.state[3])
    assert_identical(together.conv_state[3], alone.conv_state[3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("repeated", [False, True], ids=["random keys", "one key"])
def test_a_long_prefill_remembers_what_it_should(
    amd_gpu: Simulator, dtype: torch.dtype, repeated: bool
) -> None:
    spec = replace(SPEC, num_k_heads=1, dtype=dtype)

    check("chunk_prefill", long_prefill(spec, repeated=repeated), spec)

    assert "_bridge" in [launch.kernel for launch in amd_gpu.launches]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_long_prefill_of_unit_keys_remembers_what_it_should(
    amd_gpu: Simulator, dtype: torch.dtype
) -> None:
    spec = replace(SPEC, num_k_heads=1, dtype=dtype, qk_l2norm=False)

    check("chunk_prefill", of_unit_keys(spec), spec)

    assert "_bridge" in [launch.kernel for launch in amd_gpu.launches]


def test_a_state_that_keys_made_grow_is_not_forgotten(amd_gpu: Simulator) -> None:
    spec = replace(SPEC, num_k_heads=1, dtype=torch.float32, qk_l2norm=False)
    call = of_growing_states(spec)
    state = call["state"].clone()

    out = simulated(spec).chunk_prefill(**call)
    expected = bind(spec, "cpu").chunk_prefill(**{**call, "state": state})

    assert_remembered(out, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_finished_front_end_leaves_a_rule_nothing_to_do(
    amd_gpu: Simulator, dtype: torch.dtype
) -> None:
    from gdn_backend_triton.conv1d import make_front_end

    spec, device = replace(SPEC, num_v_heads=6, dtype=dtype), Device("rocm", "gfx942")
    rng, live = generator(), slice(20, 160)
    mixed, a, b = random(rng, 170, spec.conv_dim + 12, dtype=dtype).split([spec.conv_dim, 6, 6], 1)
    weights, windows = params(spec, rng), pool(spec, rng, 8, live=[3, 5, 7]).conv_state
    # of padding, of nobody, and of an empty sequence are some
    metadata = PrefillMetadata(slots(0, 20, 90, 90, 160), slots(-1, 3, 7, 5))
    after = [windows.clone() for _ in range(2)]
    plain, finished = (
        make_front_end(spec, device, finished=finished)(
            mixed, a, b, weights, after[finished], metadata=metadata
        )
        for finished in (False, True)
    )

    squares = finished[1].float().square().sum(-1).repeat_interleave(3, 1)
    rounded = torch.where((squares - 1).abs() < 2**-8, squares, 1.0)
    for got, expected in zip(finished[:3], plain[:3], strict=True):
        assert torch.equal(got[live], expected[live])
    torch.testing.assert_close(finished[3][live], plain[3][live].exp())
    torch.testing.assert_close((finished[4] * rounded)[live], plain[4][live])
    assert (rounded[live] != 1).any()
    for x, neutral in zip(finished, (0, 0, 0, 1, 0), strict=True):
        assert (x[:20] == neutral).all() and (x[160:] == neutral).all()
    assert_identical(*after)


def test_gates_of_many_heads_are_found_some_tokens_at_a_time(amd_gpu: Simulator) -> None:
    from gdn_backend_triton.conv1d import make_front_end

    spec, rng = replace(SPEC, num_k_heads=1, num_v_heads=64, head_k_dim=16), generator()
    rows = random(rng, 75, spec.conv_dim + 128, dtype=spec.dtype)
    mixed, a, b = rows.split([spec.conv_dim, 64, 64], 1)
    weights, windows = params(spec, rng), pool(spec, rng, 8, live=[3, 5]).conv_state
    metadata = PrefillMetadata(slots(0, 5, 75), slots(5, 3))

    *_, g, beta = make_front_end(spec, Device("rocm", "gfx942"))(
        mixed, a, b, weights, windows, metadata=metadata
    )

    expected = bind(spec, "cpu").gating(a, b, weights.A_log, weights.dt_bias)
    torch.testing.assert_close((g, beta), expected)


@pytest.fixture
def v_first(monkeypatch: pytest.MonkeyPatch) -> GdnSpec:
    """Let the simulated GPU hold states as Hopper does, of the layer that is returned."""
    module = pytest.importorskip("gdn_backend_triton.chunk_prefill")
    monkeypatch.setattr(module, "V_FIRST_TILES", {"gfx942": module.TILES["sm90"]})
    return replace(SPEC, num_k_heads=1, head_k_dim=64, head_v_dim=64, dtype=torch.bfloat16)


def test_a_prefill_with_states_held_v_first(amd_gpu: Simulator, v_first: GdnSpec) -> None:
    check("chunk_prefill", call_of("chunk_prefill", v_first), v_first)


def test_a_long_prefill_with_states_held_v_first(amd_gpu: Simulator, v_first: GdnSpec) -> None:
    check("chunk_prefill", long_prefill(v_first), v_first)

    assert "_bridge" in [launch.kernel for launch in amd_gpu.launches]


def test_a_prefill_of_short_sequences_takes_half_heads(
    amd_gpu: Simulator, v_first: GdnSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gdn_backend_triton import chunk_prefill as module

    monkeypatch.setitem(module.V_FIRST_TILES, "gfx942", module.Tile(128, 8, 1, 132))
    monkeypatch.setattr(module, "HALF_TILES", {"gfx942": module.TILES["sm90"]})
    spec = replace(v_first, head_v_dim=128)

    check("chunk_prefill", call_of("chunk_prefill", spec), spec)

    (scan,) = [launch for launch in amd_gpu.launches if launch.kernel == "_scan"]
    assert scan.num_warps == 4


@pytest.mark.parametrize(
    ("lengths", "known", "deterministic", "warps"),
    [
        ([576], False, False, 4),
        ([577], False, False, 8),
        ([1000] * 8, True, False, 4),
        ([1000] * 8, False, False, 8),
        ([4, 577], True, False, 8),
        ([1600] * 8, True, False, 8),
        ([100] * 9, True, False, 8),
        ([100], True, True, 4),
    ],
    ids=[
        "short",
        "long for a segment of 4 chunks",
        "known",
        "unknown",
        "one is long",
        "all are long",
        "too many",
        "deterministic",
    ],
)
def test_half_heads_are_for_few_sequences_that_are_known_to_be_short(
    monkeypatch: pytest.MonkeyPatch,
    lengths: list[int],
    known: bool,
    deterministic: bool,
    warps: int,
) -> None:
    module = pytest.importorskip("gdn_backend_triton.launches")
    launched: dict[str, int] = {}

    def record(launch: Any, *_: object) -> None:
        launched[launch._kernel.__name__] = launch._options["num_warps"]

    monkeypatch.setattr(module.Launch, "__call__", record)
    spec = replace(
        SPEC, num_k_heads=2, num_v_heads=8, head_k_dim=128, head_v_dim=128, dtype=torch.bfloat16
    )
    prefill = bind(
        spec, Device("cuda", "sm90"), backend="triton", deterministic=deterministic, check=False
    ).chunk_prefill
    T = sum(lengths)
    metadata = PrefillMetadata(
        torch.tensor([0, *lengths]).cumsum(0).int(),
        torch.arange(len(lengths)),
        seq_lens_cpu=lengths if known else None,
    )
    qk, v, g = torch.empty(T, 2, 128), torch.empty(T, 8, 128), torch.empty(T, 8)

    prefill(
        qk.bfloat16(), qk.bfloat16(), v.bfloat16(), g, g, torch.empty(9, 8, 128, 128),
        metadata=metadata,
    )  # fmt: skip

    assert launched["_scan"] == warps
    assert "_bridge" not in launched or warps == 8


def test_warmup_launches_every_tile_of_a_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("gdn_backend_triton.launches")
    launched: set[tuple[object, ...]] = set()

    def record(launch: Any, _: int, __: object, ___: object, numbers: tuple[object, ...]) -> None:
        if launch._kernel.__name__ == "_scan":
            # the last 12 are its constants
            launched.add((*launch._options.items(), *numbers[-12:]))

    monkeypatch.setattr(module.Launch, "__call__", record)
    spec = replace(
        SPEC, num_k_heads=1, num_v_heads=8, head_k_dim=128, head_v_dim=128, dtype=torch.bfloat16
    )
    ops = bind(spec, Device("cuda", "sm90"), backend="triton", check=False)
    launchers = {op: getattr(ops, op.value) for op in Op}
    warmup(spec, Device("cpu"), launchers, batch_sizes=(), prefill_tokens=(2048,), max_drafts=0)
    warmed, tiles = set(launched), []

    for lengths in ([64], [576], [2048], [1000] * 8, [100] * 16, [2000] * 16):
        launched.clear()
        tokens, N = sum(lengths), len(lengths)
        q, v = torch.empty(tokens, 1, 128).bfloat16(), torch.empty(tokens, 8, 128).bfloat16()
        g, state = torch.empty(tokens, 8), torch.empty(1, 8, 128, 128)
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        metadata = PrefillMetadata(offsets, torch.arange(N), seq_lens_cpu=lengths)
        ops.chunk_prefill(q, q, v, g, g, state, metadata=metadata)
        tiles += launched

    assert len(set(tiles)) == 3
    assert set(tiles) <= warmed


@pytest.mark.parametrize("case", ["gating", "gated_rms_norm", *DECODES, *PREFILLS, *VERIFIES])
def test_a_gradient_that_no_kernel_gives_is_refused(case: str) -> None:
    pytest.importorskip("triton")
    call = call_of(case, SPEC)
    wanted = {
        name: call[name].detach().clone().requires_grad_() for name in ACTIVATIONS if name in call
    }

    with pytest.raises(InputError, match=r"needs torch\.no_grad\(\)"):
        getattr(simulated(), case.partition(" ")[0])(**{**call, **wanted})


UNFIT = {
    "head dims (K, V) are (48, 16), needs powers of two from 16 to 256": {"head_k_dim": 48},
    "head dims (K, V) are (32, 512), needs powers of two from 16 to 256": {"head_v_dim": 512},
    "conv_width is 5, needs 2 to 4": {"conv_width": 5},
    "conv dtype is torch.float64, needs": {"conv_dtype": torch.float64},
    "dtype is torch.float64, needs": {"dtype": torch.float64},
    "state dtype is torch.float64, needs": {"state_dtype": torch.float64},
}


@pytest.mark.parametrize(("reason", "change"), UNFIT.items(), ids=UNFIT)
def test_a_layer_that_no_kernel_fits_is_told_why(reason: str, change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError) as caught:
        bind(replace(SPEC, **change), Device("rocm", "gfx942"), backend="triton")

    assert reason in str(caught.value)


@pytest.mark.parametrize("device", [Device("rocm", "gfx90a"), Device("cuda", "sm80")])
def test_an_architecture_nobody_tested_is_told_which_were(device: Device) -> None:
    with pytest.raises(UnsupportedError, match=f"arch is {device.arch}, needs sm90 or .*gfx950"):
        bind(SPEC, device, backend="triton")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Return what makes it look as if only these versions of Triton were installed."""

    def install(versions: dict[str, str]) -> None:
        def version(name: str) -> str:
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())

    return install


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("triton", "3.6.0"),
        ("triton", "3.10.0"),
        ("triton", "4.0"),
        ("pytorch-triton-rocm", "3.6.0+rocm7.0"),
    ],
)
def test_triton_may_be_of_any_distribution_and_newer(
    installed: Callable[[dict[str, str]], None], name: str, version: str
) -> None:
    installed({name: version})

    assert triton_is_missing() is None


@pytest.mark.parametrize(
    ("versions", "reason"),
    [
        ({"triton": "3.5.1"}, "triton is 3.5.1, needs 3.6 or newer"),
        ({"triton-rocm": "2.9"}, "triton-rocm is 2.9, needs 3.6 or newer"),
        ({}, "module 'triton' is from none of triton, pytorch-triton"),
    ],
)
def test_a_triton_that_is_too_old_or_unknown_is_named(
    installed: Callable[[dict[str, str]], None], versions: dict[str, str], reason: str
) -> None:
    installed(versions)

    assert (triton_is_missing() or "").startswith(reason)


def test_a_missing_triton_is_named_for_every_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(UnsupportedError, match="triton is not installed"):
        bind(SPEC, Device("cuda", "sm90"))
