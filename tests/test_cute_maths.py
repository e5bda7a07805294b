# SPDX-License-Identifier: Apache-2.0
"""The CuTe kernel's own maths, run lane by lane on a CPU, passes as a kernel does."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from gdn_portable import GdnSpec, bind
from tests.calls import leaves
from tests.cute_cases import SPEC, replay_case
from tests.cute_double import HOPPER, Double

BFLOAT16 = replace(SPEC, state_dtype=torch.bfloat16)
FLOAT16 = replace(SPEC, state_dtype=torch.float16)
KINDS: dict[str, tuple[GdnSpec, dict[str, int]]] = {
    "fp32 state": (SPEC, {}),
    "fp32 state, ties": (SPEC, {"ties": True, "bias": True}),
    "fp32 state, none pending": (replace(SPEC, num_v_heads=2), {"fresh": True}),
    "bf16 state, ratio 4, ties": (
        replace(BFLOAT16, num_k_heads=1),
        {"ties": True, "bias": True},
    ),
    "fp16 state, ties": (FLOAT16, {"ties": True, "bias": True}),
    "fp16": (replace(SPEC, dtype=torch.float16), {"bias": True, "ties": True}),
    "fp16, bf16 state": (replace(BFLOAT16, dtype=torch.float16, num_v_heads=2), {"P": 3}),
    "fp16, fp16 state": (replace(FLOAT16, dtype=torch.float16, num_v_heads=2), {}),
    "fp32 state, eight drafts, ties": (SPEC, {"P": 8, "ties": True, "bias": True}),
    "bf16 state, five drafts": (replace(BFLOAT16, num_v_heads=2), {"P": 5}),
    "fp32 state, sixteen drafts, ties": (SPEC, {"P": 16, "ties": True, "bias": True}),
    "bf16 state, nine drafts, room for twelve": (BFLOAT16, {"P": 9, "room": 12, "ties": True}),
    "fp16, two drafts, room for sixteen": (
        replace(SPEC, dtype=torch.float16),
        {"P": 2, "room": 16},
    ),
    "fp16, two drafts, room for six": (replace(SPEC, dtype=torch.float16), {"P": 2, "room": 6}),
    "fp16 state, two drafts": (replace(FLOAT16, num_v_heads=2), {"P": 2}),
    "fp32 state, three drafts, ties": (SPEC, {"P": 3, "ties": True}),
    "fp32 state, two drafts, room for three": (SPEC, {"P": 2, "room": 3, "bias": True}),
    "bf16 state, one draft, room for four": (BFLOAT16, {"P": 1, "room": 4}),
    "bf16 state, no norm, null block": (
        replace(BFLOAT16, num_v_heads=2, qk_l2norm=False, pad_slot=0, activation=None),
        {},
    ),
}


@pytest.mark.parametrize(("spec", "options"), KINDS.values(), ids=KINDS)
def test_the_kernels_maths_passes(
    monkeypatch: pytest.MonkeyPatch, spec: GdnSpec, options: dict[str, int]
) -> None:
    double = Double(monkeypatch)
    monkeypatch.setattr(double.launcher, "least_items", lambda *_: 1)
    step = double.launcher.make_verify_step(spec, HOPPER, deterministic=False)

    def verify_step(**arguments: Any) -> torch.Tensor:
        double.memory = [x for x in leaves(arguments).values() if isinstance(x, torch.Tensor)]
        return step(**arguments)

    ops = dataclasses.replace(bind(spec, "cpu", backend="reference"), verify_step=verify_step)

    replay_case(spec, 6, **options).check(ops)

    assert double.started == 1
