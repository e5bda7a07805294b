# SPDX-License-Identifier: Apache-2.0
"""Triton's machine code for AMD GPUs passes every case, on simulated GPUs with all their checks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch

from gdn_portable import ConvLayout, DraftProtocol, GdnOps, GdnSpec, StateLayout, bind
from gdn_portable.demo.generate import Generator, Sampling, Speculation
from gdn_portable.demo.model import WEIGHTS, load_model
from gdn_portable.testing import Case, cases

if TYPE_CHECKING:
    from ci.amdgcn import Simulator

SMALL = GdnSpec(
    num_k_heads=1,
    num_v_heads=2,
    head_k_dim=32,
    head_v_dim=32,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
)
PROMPTS = [b"ROMEO", b"To be"]
SMALLEST = replace(SMALL, num_v_heads=1, head_k_dim=16, head_v_dim=16)
OTHER_LAYOUTS = {"state_layout": StateLayout.KV, "conv_layout": ConvLayout.LEN_FIRST}
# between them, on either GPU: every dtype of activations and of states, ratios 1, 2, 3 and 8,
# K > V and K < V, all layouts, conv widths and activations, and null blocks
SPECS = {
    "gfx942": {
        "bf16": SMALL,
        "fp16, fp16 state, ratio 3": replace(
            SMALL,
            num_v_heads=3,
            head_k_dim=16,
            dtype=torch.float16,
            state_dtype=torch.float16,
            conv_width=3,
            **OTHER_LAYOUTS,
        ),
        "fp32, null block": replace(
            SMALL,
            num_v_heads=1,
            head_v_dim=16,
            dtype=torch.float32,
            conv_width=2,
            activation=None,
            gate_activation="sigmoid",
            pad_slot=0,
        ),
        "K = V = 128, bf16 state": replace(
            SMALL,
            num_v_heads=1,
            head_k_dim=128,
            head_v_dim=128,
            state_dtype=torch.bfloat16,
        ),
    },
    "gfx950": {
        "bf16, KV, ratio 8": replace(
            SMALL, num_v_heads=8, head_v_dim=16, state_layout=StateLayout.KV
        ),
        "fp16, K = 64": replace(
            SMALL,
            num_k_heads=2,
            head_k_dim=64,
            dtype=torch.float16,
            conv_width=3,
            activation=None,
        ),
        "fp32, bf16 state, LEN_FIRST": replace(
            SMALL,
            num_v_heads=3,
            head_k_dim=16,
            dtype=torch.float32,
            state_dtype=torch.bfloat16,
            conv_dtype=torch.bfloat16,
            conv_width=2,
            conv_layout=ConvLayout.LEN_FIRST,
        ),
        "K = V = 128, null block": replace(
            SMALL, num_v_heads=1, head_k_dim=128, head_v_dim=128, scale=0.3, pad_slot=0
        ),
        "K = 256": replace(SMALL, num_v_heads=1, head_k_dim=256, head_v_dim=16),
    },
}
NAMES = [case.name for case in cases(SMALLEST)]
EVERY = [(arch, spec, name) for arch, specs in SPECS.items() for spec in specs for name in NAMES]
# what workgroups, or waves, share through global memory: segments and checkpoints of a prefill,
# windows, pending drafts
SHARED = (
    "conv of prefill of long sequences",
    "rule of prefill of long sequences",
    "prefill of long sequences",
    "prefill to other slots",
    "decode to other slots with a gate",
    "verify of a chain by replay",
    "verify of a ragged chain by slot table",
    "verify of a tree by replay",
    "commit of verify of a tree by replay",
)


@cache
def _cases(spec: GdnSpec) -> dict[str, Case]:
    return {case.name: case for case in cases(spec)}


@cache
def _bound(spec: GdnSpec, arch: str) -> GdnOps:
    from ci.amdgcn import bind_simulated

    return bind_simulated(spec, arch)


@pytest.mark.parametrize(("arch", "spec", "name"), EVERY)
def test_a_simulated_gpu_passes_every_case(
    amd_gpu: Simulator, arch: str, spec: str, name: str
) -> None:
    case = _cases(SPECS[arch][spec])[name]

    case.check(_bound(case.spec, arch))

    assert amd_gpu.launches


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize(("arch", "order"), [("gfx942", "FORWARD"), ("gfx950", "REVERSED")])
def test_the_order_of_workgroups_and_waves_does_not_matter(
    amd_gpu: Simulator, arch: str, order: str, name: str
) -> None:
    case = _cases(SMALLEST)[name]
    amd_gpu.order = type(amd_gpu.order)[order]

    case.check(_bound(case.spec, arch))

    assert amd_gpu.launches


@pytest.mark.parametrize("speculation", [None, Speculation(DraftProtocol.REPLAY, 4, 1)], ids=str)
@pytest.mark.parametrize("arch", SPECS)
def test_the_demo_writes_the_bytes_of_the_reference(
    amd_gpu: Simulator, arch: str, speculation: Speculation | None
) -> None:
    model = load_model(WEIGHTS, torch.device("cpu"), torch.float32, max_drafts=5)

    def written(ops: GdnOps) -> list[bytes]:
        return Generator(model, ops, 2, Sampling(), speculation).run(PROMPTS, new_bytes=6).texts

    assert written(_bound(model.spec, arch)) == written(bind(model.spec, "cpu"))
