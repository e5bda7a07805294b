# SPDX-License-Identifier: Apache-2.0
"""SGLang's own tests of its GDN backend pass, with their own reference and their own bounds."""

from __future__ import annotations

import unittest
from dataclasses import replace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.kits.attention_unittest.attention_methods import gdn_attention
from sglang.test.kits.attention_unittest.runner_modes import (
    cuda_graph_decode_runner,
    speculative_target_verify_runner,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {case.name: case for case in gdn_attention.make_gdn_cases("none")}
DECODES = {name: case for name, case in CASES.items() if case.forward_mode.is_decode()}
EXTEND = CASES["gdn_extend_ragged_page_boundary"]
TESTCASE = unittest.TestCase()
pytestmark = pytest.mark.usefixtures("steps")
HEADS = {
    "as they are": {},
    "GVA, K != V": {"num_v_heads": 6, "head_k_dim": 16},
}


def _with_heads(case: Any, heads: str) -> tuple[Any, dict[str, int]]:
    options = dict(HEADS[heads])
    return replace(case, num_v_heads=options.pop("num_v_heads", case.num_v_heads)), options


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", CASES)
def test_a_case_of_sglangs_kit_passes(name: str, heads: str) -> None:
    case, dims = _with_heads(CASES[name], heads)

    gdn_attention.run_gdn_attention_case(TESTCASE, case, device=DEVICE, **dims)


@pytest.mark.parametrize("name", DECODES)
def test_decode_on_the_buffers_of_a_graph_passes(name: str) -> None:
    case = DECODES[name]

    cuda_graph_decode_runner.run_gdn_cuda_graph_decode_case(
        TESTCASE, case, device=DEVICE, cuda_graph_capture_batch_size=case.batch_size
    )


@pytest.mark.parametrize("topk", [1, 2], ids=["chain", "tree"])
@pytest.mark.parametrize(
    "run", ["run_gdn_eagle_verify_case", "run_gdn_eagle_verify_cuda_graph_case"]
)
def test_verify_passes(run: str, topk: int) -> None:
    case = replace(
        EXTEND,
        name="verify",
        forward_mode=ForwardMode.TARGET_VERIFY,
        prefix_lens=(3, 0, 16),
        extend_lens=(3, 3, 3),
    )

    getattr(speculative_target_verify_runner, run)(TESTCASE, case, topk=topk, device=DEVICE)


@pytest.mark.parametrize("weight", [0.0, 0.5], ids=["no history", "history"])
def test_multi_item_scoring_passes(weight: float) -> None:
    case = replace(
        EXTEND,
        name="scoring",
        prefix_lens=(0, 0),
        extend_lens=(9, 7),
        mis_delimiter_indices=((3, 6, 8), (0, 4, 6)),
        conv_history_weight=weight,
    )

    gdn_attention.run_gdn_attention_case(TESTCASE, case, device=DEVICE)
