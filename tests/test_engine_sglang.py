# SPDX-License-Identifier: Apache-2.0
"""SGLang's signatures keep the contract of the ops behind them: the same cases, the same bounds."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch

from gdn_portable import GdnSpec, bind
from gdn_portable.testing import Case, cases
from tests.sglang_calls import by_way_of_sglang, is_sglangs, simulated

if TYPE_CHECKING:
    from ci.amdgcn import Simulator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPEC = GdnSpec(
    num_k_heads=1,
    num_v_heads=2,
    head_k_dim=32,
    head_v_dim=16,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
)
SPECS = {
    "bf16": SPEC,
    "fp16, bf16 state, ratio 3, width 2": replace(
        SPEC,
        num_v_heads=3,
        dtype=torch.float16,
        state_dtype=torch.bfloat16,
        conv_width=2,
        activation=None,
    ),
    "fp32, K = V, width 3": replace(SPEC, head_k_dim=16, dtype=torch.float32, conv_width=3),
}
NAMES = [case.name for case in cases(SPEC) if is_sglangs(case)]
SIMULATED = [name for name in NAMES if "long" not in name]


@cache
def _cases(spec: GdnSpec) -> dict[str, Case]:
    return {case.name: case for case in cases(spec)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", SPECS)
def test_sglangs_signatures_pass_every_case(spec: str, name: str) -> None:
    case = _cases(SPECS[spec])[name]

    case.check(by_way_of_sglang(bind(case.spec, DEVICE), bind))


@pytest.mark.parametrize("name", SIMULATED)
def test_sglangs_signatures_pass_every_case_on_a_simulated_gpu(
    amd_gpu: Simulator, name: str
) -> None:
    case = _cases(SPEC)[name]

    case.check(by_way_of_sglang(simulated(case.spec, "cpu"), simulated))

    assert amd_gpu.launches
