# SPDX-License-Identifier: Apache-2.0
"""What the kernels move on simulated AMD GPUs: bounds that a slower kernel would break."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from ci.amdgcn.profile import CASES, Profile, profile
from gdn_portable.bench.cases import LAYER, Case
from gdn_portable.bench.floors import work_of

ARCHS = ["gfx942", "gfx950"]
DECODE = Case(op="decode_step", spec=LAYER, lengths=(1,) * 64)
PREFILL = next(case for case in CASES if case.op == "chunk_prefill" and sum(case.lengths) == 512)
# of fla-core 0.6.0: python -m ci.amdgcn.profile --case 'chunk_prefill*2x256*'
FLA_UNIQUE_BYTES = 18_285_064


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_a_decode_moves_states_and_activations_and_hardly_more(
    arch: str, state: torch.dtype
) -> None:
    case = replace(DECODE, spec=replace(LAYER, state_dtype=state))

    found = profile(case, arch)

    ideal = work_of(case).bytes
    assert ideal <= found.unique_bytes <= 1.03 * ideal
    assert found.issued_bytes <= 1.15 * ideal
    assert found.spills == 0


@pytest.mark.parametrize("arch", ARCHS)
def test_a_prefill_moves_half_as_much_as_its_peer_at_most(arch: str) -> None:
    found = profile(PREFILL, arch)

    assert work_of(PREFILL).bytes <= found.unique_bytes <= FLA_UNIQUE_BYTES / 2
    assert found.mfma_flops > 0
    assert found.spills == 0


def test_a_profile_adds_up_its_launches() -> None:
    found = profile(replace(DECODE, lengths=(1, 1)), "gfx942")
    parts = [Profile(found.case, found.name, (launch,)) for launch in found.launches]

    assert [launch.kernel for launch in found.launches] == ["_conv1d_update", "_decode"]
    for name in ("instructions", "unique_bytes", "issued_bytes", "lds_bytes"):
        assert getattr(found, name) == sum(getattr(part, name) for part in parts) > 0
