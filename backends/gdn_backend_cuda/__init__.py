# SPDX-License-Identifier: Apache-2.0
"""Kernels for NVIDIA: those of others and our own where they are right and fast, then the shared.

The shared Triton decode and verify are faster than FlashInfer's at every batch size on an H200,
so they come first; FlashInfer's serve where they are named. ``cute.verify_step`` replays chains of
up to sixteen drafts in one kernel of the CuTe DSL, faster still from some batch size on. It and
``flashinfer.mtp_verify`` call Triton's kernels themselves for drafts that theirs do not take, which
no name shows: their modules list them. Which prefill is fastest depends on the batch: it is chosen
by times, those in ``tuned`` or those that the command ``tune`` took.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from gdn_backend_triton import KERNELS as SHARED
from gdn_backend_triton import shapes_are_unfit, triton_is_missing
from gdn_backend_triton.launch import lazily

from gdn_backend_cuda.cute_probe import cute_is_unfit
from gdn_backend_cuda.flashinfer_probe import (
    DECODE,
    PREFILL,
    SCRATCH,
    VERIFY,
    VERIFY_BFLOAT16,
    is_unfit,
)
from gdn_portable.backend import Backend, Kernel
from gdn_portable.measured import measured
from gdn_portable.spec import Device, GdnSpec, Op, StateLayout

OLDEST = (0, 6, 14)
OLDEST_PREFILL = (0, 7, 0)  # before, Hopper's takes no slots
BFLOAT16 = (torch.bfloat16,)  # FlashInfer's decode and verify round float16 to it
CONV_WIDTH = 4  # of the CuTe kernel
MOST_RATIO = 4  # of value heads to key heads: with more the CuTe kernel has not been timed

Probe = Callable[[], str | None]


def _first_of(*probes: Probe) -> Probe:
    """Return a probe that gives the first reason of several."""

    def probe() -> str | None:
        return next((reason for each in probes if (reason := each()) is not None), None)

    return probe


PREFILLS = _first_of(
    triton_is_missing, is_unfit(PREFILL, OLDEST_PREFILL), is_unfit(SCRATCH, OLDEST_PREFILL)
)
DECODES = _first_of(triton_is_missing, is_unfit(DECODE, OLDEST))
VERIFIES = _first_of(triton_is_missing, is_unfit(VERIFY, OLDEST), is_unfit(VERIFY_BFLOAT16, OLDEST))
REPLAYS = _first_of(triton_is_missing, cute_is_unfit)


def _has_no_scratch(spec: GdnSpec, device: Device) -> str | None:
    if spec.scratch_slot is None:
        return "scratch_slot is None, needs a slot that padding may write"
    return shapes_are_unfit(spec, device)


def _replay_is_unfit(spec: GdnSpec, device: Device) -> str | None:
    """Return why the CuTe kernel cannot take a layer."""
    ratio = spec.num_v_heads // spec.num_k_heads
    if spec.conv_width != CONV_WIDTH:
        return f"conv_width is {spec.conv_width}, needs {CONV_WIDTH}"
    if spec.conv_state_dtype != spec.dtype:
        return f"conv dtype is {spec.conv_state_dtype}, needs {spec.dtype}"
    if ratio > MOST_RATIO:
        return f"HV / H is {ratio}, needs at most {MOST_RATIO}"
    return None


def _hopper(
    op: Op,
    name: str,
    target: str,
    probe: Probe,
    dtypes: tuple[torch.dtype, ...],
    refuse: Callable[[GdnSpec, Device], str | None],
    state_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
) -> Kernel:
    return Kernel(
        op=op,
        name=name,
        target=lazily(f"gdn_backend_cuda.{target}"),
        probe=probe,
        devices=("cuda",),
        archs=("sm90",),
        dtypes=dtypes,
        state_dtypes=state_dtypes,
        head_dims=((128, 128),),
        state_layouts=(StateLayout.VK,),
        conv_layouts=None,
        refuse=refuse,
    )


def _prefill(op: Op, name: str, target: str) -> Kernel:
    dtypes = (torch.bfloat16, torch.float16)
    return _hopper(op, f"flashinfer.{name}", target, PREFILLS, dtypes, shapes_are_unfit)


TABLE = (
    _prefill(Op.CHUNK_PREFILL, "chunk_prefill", "flashinfer_prefill:make_chunk_prefill"),
    _prefill(Op.CHUNK_PREFILL, "chunk_prefill_cp", "flashinfer_prefill:make_chunk_prefill_cp"),
    _prefill(Op.PREFILL_STEP, "prefill_step", "prefill_step:make_prefill_step"),
    _prefill(Op.PREFILL_STEP, "prefill_step_cp", "prefill_step:make_prefill_step_cp"),
    _hopper(
        Op.VERIFY_STEP,
        "cute.verify_step",
        "cute_verify_step:make_verify_step",
        REPLAYS,
        (torch.bfloat16, torch.float16),
        _replay_is_unfit,
        state_dtypes=(torch.float32, torch.bfloat16, torch.float16),
    ),
    *SHARED,
    _hopper(
        Op.RECURRENT_DECODE,
        "flashinfer.recurrent_decode",
        "flashinfer_decode:make_recurrent_decode",
        DECODES,
        BFLOAT16,
        _has_no_scratch,
    ),
    _hopper(
        Op.MTP_VERIFY,
        "flashinfer.mtp_verify",
        "flashinfer_verify:make_mtp_verify",
        VERIFIES,
        BFLOAT16,
        _has_no_scratch,
    ),
)
TUNED = Path(__file__).parent / "tuned"
BACKEND = Backend(name="cuda", devices=("cuda",), kernels=(*measured(TABLE, TUNED), *TABLE))
