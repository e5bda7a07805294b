# SPDX-License-Identifier: Apache-2.0
"""SGLang calls AMD's machine code, simulated: its own tests pass, and padding touches no slot."""

from __future__ import annotations

import unittest
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.kits.attention_unittest.attention_methods import gdn_attention
from sglang.test.kits.attention_unittest.runner_modes import speculative_target_verify_runner

from tests.cases import bits
from tests.engine_sglang.layer import DEVICE, make_layer, pools, prepare_graph, run, run_eagerly
from tests.engine_sglang.package import register
from tests.sglang_calls import simulated

if TYPE_CHECKING:
    from ci.amdgcn import Simulator

if DEVICE != "cpu":
    pytest.skip("simulates an AMD GPU for tensors on the CPU", allow_module_level=True)

TESTCASE = unittest.TestCase()
CASES = {case.name: case for case in gdn_attention.make_gdn_cases("none")}
NAMES = ("gdn_extend_ragged_page_boundary", "gdn_decode_page_boundary")


@pytest.fixture(params=[True, False], ids=["steps", "kernels"])
def amd(amd_gpu: Simulator, request: pytest.FixtureRequest) -> Iterator[Simulator]:
    register(simulated, steps=request.param)
    yield amd_gpu
    assert amd_gpu.launches


@pytest.mark.parametrize("name", NAMES)
def test_a_case_of_sglangs_kit_passes(amd: Simulator, name: str) -> None:
    gdn_attention.run_gdn_attention_case(TESTCASE, CASES[name], device=DEVICE)


@pytest.mark.parametrize("topk", [1, 2], ids=["chain", "tree"])
def test_verify_passes(amd: Simulator, topk: int) -> None:
    case = replace(
        CASES["gdn_extend_ragged_page_boundary"],
        name="verify",
        forward_mode=ForwardMode.TARGET_VERIFY,
        prefix_lens=(3, 0),
        extend_lens=(3, 3),
    )

    speculative_target_verify_runner.run_gdn_eagle_verify_case(
        TESTCASE, case, topk=topk, device=DEVICE
    )


def test_requests_that_pad_the_decode_of_a_graph_touch_no_slot(amd: Simulator) -> None:
    plain, padded = (make_layer(ForwardMode.DECODE, (1, 1, 1)) for _ in range(2))
    prepare_graph(padded, 5)

    want, got = run_eagerly(plain), run(padded)

    assert torch.equal(bits(got[:3]), bits(want))
    assert not got[3:].any()
    for pool, other in zip(pools(padded), pools(plain), strict=True):
        assert torch.equal(bits(pool), bits(other))
        assert pool[[0, 2, 3, 5, 6]].isnan().all()
