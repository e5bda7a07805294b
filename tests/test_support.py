# SPDX-License-Identifier: Apache-2.0
"""The support tables say of a kernel what it declares and what it refuses, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ci.support import CPU, GPUS, Served, Takes, served, takes
from gdn_portable import Device, GdnSpec, Op, StateLayout
from gdn_portable.reference import BACKEND as REFERENCE

ANYTHING = next(kernel for kernel in REFERENCE.kernels if kernel.op is Op.RECURRENT_DECODE)
EVERY = "fp32, bf16, fp16, fp64"
AMD = [device for device in GPUS if device.kind == "rocm"]


def _needs_scratch(spec: GdnSpec, device: Device) -> str | None:
    return "no scratch_slot" if spec.scratch_slot is None else None


def test_a_kernel_without_restrictions_takes_everything() -> None:
    assert takes(ANYTHING, [CPU]) == Takes(
        "any device", EVERY, EVERY, EVERY, "any", "any", "both", ""
    )


def test_what_a_kernel_declares_and_refuses_is_in_its_row() -> None:
    picky = replace(
        ANYTHING,
        probe=lambda: "not installed here, which is no matter",
        archs=("gfx950",),
        dtypes=(torch.bfloat16, torch.float16),
        state_dtypes=(torch.float32,),
        head_dims=((128, 64), (128, 128)),
        state_layouts=(StateLayout.VK,),
        refuse=_needs_scratch,
    )

    found = takes(picky, AMD)

    assert found.devices == "gfx950"
    assert (found.activations, found.states) == ("bf16, fp16", "fp32")
    assert found.head_dims == "128 / 64, 128"
    assert (found.state_layouts, found.besides) == ("VK", "`scratch_slot`")


@pytest.mark.parametrize(
    ("arch", "op", "cell"),
    [
        ("gfx942", Op.GATING, Served(("triton",), ())),
        ("gfx942", Op.PLAN_PREFILL, Served(("triton",), ("aiter",))),
        ("gfx942", Op.CONV1D_UPDATE, Served(("triton",), ("aiter.causal_conv1d_update",))),
    ],
)
def test_what_serves_stands_in_front_of_what_is_named(arch: str, op: Op, cell: Served) -> None:
    device = next(device for device in GPUS if device.arch == arch)

    assert served(device, op) == cell


def test_what_is_chosen_by_times_is_named_with_all_candidates() -> None:
    hopper = next(device for device in GPUS if device.arch == "sm90")

    found = served(hopper, Op.CHUNK_PREFILL)

    assert set(found.serving) >= {"flashinfer", "triton"}
    assert "by times" in str(found)
