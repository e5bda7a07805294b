# SPDX-License-Identifier: Apache-2.0
"""How engines keep their states changes no bit of the results on AMD, and nothing is copied.

Conventions: as this library allocates; as SGLang does, also where windows start at no multiple of
16 bytes; and as ATOM's ModelRunner does, whose windows are [slot, L, D] and who looks at states
kept as VK through a view [slot, HV, K, V].
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from gdn_portable import (
    ConvLayout,
    GdnOps,
    GdnSpec,
    Op,
    ReplayDrafts,
    SnapshotDrafts,
    StatePool,
    VerifyMetadata,
)
from gdn_portable.testing import Case, cases
from tests.cases import assert_identical, copies

if TYPE_CHECKING:
    from ci.amdgcn import Simulator

SPEC = GdnSpec(
    num_k_heads=1,
    num_v_heads=2,
    head_k_dim=16,
    head_v_dim=16,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
)
CONVENTIONS = {
    "SGLang": ConvLayout.DIM_FIRST,
    "SGLang, misaligned": ConvLayout.DIM_FIRST,
    "ATOM": ConvLayout.LEN_FIRST,
}
STEPS = (Op.PREFILL_STEP, Op.DECODE_STEP, Op.VERIFY_STEP, Op.MTP_COMMIT)
NAMES = [case.name for case in cases(SPEC) if case.op in STEPS]
# the kernels' names for what belongs to the engine
ENGINES = ("state", "conv_state", "window", "checkpoint_state", "kept", "kept_window")

Call = dict[str, Any]


@cache
def _cases() -> dict[str, Case]:
    return {case.name: case for case in cases(SPEC)}


@cache
def _bound(spec: GdnSpec, arch: str) -> GdnOps:
    from ci.amdgcn import bind_simulated

    return bind_simulated(spec, arch)


@cache
def _canonical(arch: str, name: str) -> Call:
    """Return a call as it is after it was made, on memory as this library allocates it."""
    case, call = _cases()[name], copies(_cases()[name].arguments)
    getattr(_bound(case.spec, arch), case.op.value)(**call)
    return call


def _memory_of(tensor: Tensor, *, swapped: bool = False, misaligned: bool = False) -> Tensor:
    """Return an engine's tensor of one of several layers, with the numbers of ``tensor``."""
    numbers = tensor.mT if swapped else tensor
    memory = torch.full((3 * numbers.numel() + 1,), torch.nan, dtype=tensor.dtype)
    layers = memory[1:] if misaligned else memory[:-1]
    layer = layers.view(3, *numbers.shape)[1]
    layer.copy_(numbers)
    return layer


def _passed(call: Call, convention: str) -> Call:
    """Return a call on the engine's memory, as an engine of that convention passes it."""
    swapped = CONVENTIONS[convention] is ConvLayout.LEN_FIRST
    misaligned = "misaligned" in convention

    def tensors_of(holder: StatePool | SnapshotDrafts) -> tuple[Tensor, Tensor]:
        assert holder.conv_state is not None and holder.state is not None
        state = _memory_of(holder.state)
        if convention == "ATOM":
            seen = state.mT  # [slot, HV, K, V], all that its own kernels know
            state = seen.mT
        windows = _memory_of(holder.conv_state, swapped=swapped, misaligned=misaligned)
        return windows, state

    changed = {"pool": StatePool(*tensors_of(call["pool"]))}
    if isinstance(call.get("drafts"), SnapshotDrafts):
        changed["drafts"] = SnapshotDrafts(*tensors_of(call["drafts"]))
    return {**call, **changed}


def _kept(call: Call, spec: GdnSpec) -> list[Tensor]:
    """Return all that a call may have written, windows as [slot, D, L]."""
    turned = spec.conv_layout is ConvLayout.LEN_FIRST
    found: list[Tensor] = [] if call.get("out") is None else [call["out"]]
    for name in ("pool", "drafts"):
        holder = call.get(name)
        if isinstance(holder, ReplayDrafts):
            found += [getattr(holder, part.name) for part in fields(holder)]
        elif holder is not None:
            found += [holder.conv_state.mT if turned else holder.conv_state, holder.state]
    return found


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_an_engines_convention_gives_the_same_bits_without_a_copy(
    amd_gpu: Simulator, monkeypatch: pytest.MonkeyPatch, arch: str, convention: str, name: str
) -> None:
    case, launch, given = _cases()[name], type(amd_gpu).launch, dict[str, set[int]]()

    def record(self: Simulator, text: str, names: Any, *rest: Any) -> None:
        for label, value in zip(names, rest[-1], strict=True):
            if label in ENGINES and isinstance(value, Tensor):
                given.setdefault(label, set()).add(value.data_ptr())
        launch(self, text, names, *rest)

    spec = replace(case.spec, conv_layout=CONVENTIONS[convention])
    canonical, call = _canonical(arch, name), _passed(copies(case.arguments), convention)
    monkeypatch.setattr(type(amd_gpu), "launch", record)

    getattr(_bound(spec, arch), case.op.value)(**call)

    assert_identical(_kept(call, spec), _kept(canonical, case.spec))
    holders = [call["pool"], *([call["drafts"]] if "drafts" in call else [])]
    engines = {
        getattr(holder, part.name).data_ptr()
        for holder in holders
        if holder is not None
        for part in fields(holder)
    }
    assert given and set().union(*given.values()) <= engines


def test_links_left_behind_the_last_draft_change_nothing_on_amd(amd_gpu: Simulator) -> None:
    outputs = []
    for stale in (-1, 1):
        links = torch.tensor([[1, -1, -1, stale]]), torch.tensor([[-1, 2, -1, stale]])
        metadata = VerifyMetadata(
            torch.tensor([1]), 4, torch.tensor([0, 3]), next_token=links[0], next_sibling=links[1]
        )
        rng = torch.Generator().manual_seed(0)
        mixed = torch.randn(3, SPEC.conv_dim, generator=rng).to(SPEC.dtype)
        weight = torch.randn(SPEC.conv_dim, SPEC.conv_width, generator=rng).to(SPEC.dtype)
        pool = StatePool.allocate(SPEC, 2, "cpu")
        assert pool.conv_state is not None
        drafts = SnapshotDrafts.allocate(SPEC, 1, 4, "cpu")
        verify = _bound(SPEC, amd_gpu.arch).conv1d_verify

        outputs.append(
            verify(mixed, weight, None, pool.conv_state, metadata=metadata, drafts=drafts)
        )
        assert metadata.parents is not None
        assert metadata.parents[0, :3].tolist() == [0, 0, 0]

    assert torch.equal(*outputs)
