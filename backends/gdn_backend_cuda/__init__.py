# SPDX-License-Identifier: Apache-2.0
"""Kernels for NVIDIA: FlashInfer's where they were measured right and fast, then the shared ones.

The shared Triton decode and verify are faster than FlashInfer's at every batch size on an H200,
so they come first; FlashInfer's serve where they are named. Which prefill is fastest depends on the
batch: it is chosen by times, those in ``tuned`` or those that the command ``tune`` took.
"""

from __future__ import annotations

from pathlib import Path

import torch
from gdn_backend_triton import KERNELS as SHARED
from gdn_backend_triton import shapes_are_unfit, triton_is_missing
from gdn_backend_triton.launch import lazily

from gdn_backend_cuda.flashinfer_probe import BF16_DECODE, DECODE, PREFILL, is_unfit
from gdn_portable.backend import Backend, Kernel
from gdn_portable.measured import measured
from gdn_portable.spec import Device, GdnSpec, Op, StateLayout

OLDEST = (0, 6, 14)
# before, Hopper's prefill takes no slots
OLDEST_PREFILL = (0, 7, 0)

_decode = is_unfit(f"{DECODE}:gated_delta_rule_decode_pretranspose", OLDEST)
_verify = is_unfit(f"{DECODE}:gated_delta_rule_mtp", OLDEST)
_verify_bf16 = is_unfit(f"{BF16_DECODE}:gated_delta_rule_mtp", OLDEST)
_prefill = is_unfit(f"{PREFILL}:chunk_gated_delta_rule", OLDEST_PREFILL)
_scratch = is_unfit("flashinfer.utils:_get_cache_buf", OLDEST_PREFILL)


def _prefill_is_unfit() -> str | None:
    return triton_is_missing() or _prefill() or _scratch()


def _decode_is_unfit() -> str | None:
    return triton_is_missing() or _decode()


def _verify_is_unfit() -> str | None:
    return triton_is_missing() or _verify() or _verify_bf16()


def _has_no_scratch(spec: GdnSpec, device: Device) -> str | None:
    if spec.scratch_slot is None:
        return "scratch_slot is None, needs a slot that padding may write"
    return shapes_are_unfit(spec, device)


def _flashinfer(op: Op, suffix: str, target: str, **fields: object) -> Kernel:
    common = {
        "devices": ("cuda",),
        "archs": ("sm90",),
        "state_dtypes": (torch.float32, torch.bfloat16),
        "head_dims": ((128, 128),),
        "state_layouts": (StateLayout.VK,),
        "conv_layouts": None,
    }
    return Kernel(
        op=op,
        name=f"flashinfer.{op.value}{suffix}",
        target=lazily(f"gdn_backend_cuda.{target}"),
        **{**common, **fields},
    )


LOW = (torch.bfloat16, torch.float16)
PREFILLS = {"probe": _prefill_is_unfit, "dtypes": LOW, "refuse": shapes_are_unfit}
FIRST = (
    _flashinfer(Op.CHUNK_PREFILL, "", "flashinfer_prefill:make_chunk_prefill", **PREFILLS),
    _flashinfer(Op.PREFILL_STEP, "", "prefill_step:make_prefill_step", **PREFILLS),
)
AFTER = (
    _flashinfer(Op.CHUNK_PREFILL, "_cp", "flashinfer_prefill:make_chunk_prefill_cp", **PREFILLS),
    _flashinfer(Op.PREFILL_STEP, "_cp", "prefill_step:make_prefill_step_cp", **PREFILLS),
    _flashinfer(
        Op.RECURRENT_DECODE,
        "",
        "flashinfer_decode:make_recurrent_decode",
        probe=_decode_is_unfit,
        dtypes=LOW,
        refuse=_has_no_scratch,
    ),
    _flashinfer(
        Op.MTP_VERIFY,
        "",
        "flashinfer_verify:make_mtp_verify",
        probe=_verify_is_unfit,
        dtypes=LOW,
        refuse=_has_no_scratch,
    ),
)
TABLE = (*FIRST, *SHARED, *AFTER)
TUNED = Path(__file__).parent / "tuned"
BACKEND = Backend(name="cuda", devices=("cuda",), kernels=(*measured(TABLE, TUNED), *TABLE))
