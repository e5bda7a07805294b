# SPDX-License-Identifier: Apache-2.0
"""A layer's prefill around a chunk kernel that takes what a finished front end gives."""

from __future__ import annotations

from dataclasses import replace

from gdn_backend_triton.conv1d import make_front_end
from gdn_backend_triton.gated_rms_norm import make_gated_rms_norm
from gdn_backend_triton.prefill_step import join_prefill

from gdn_backend_cuda.flashinfer_prefill import make_rule
from gdn_backend_cuda.prefill_slots import Given
from gdn_portable.interface import PrefillStep
from gdn_portable.spec import Device, GdnSpec


def make_prefill_step(spec: GdnSpec, device: Device, *, deterministic: bool) -> PrefillStep:
    """Return the step on FlashInfer's kernel without context parallelism."""
    return _make_step(spec, device, deterministic=deterministic, use_cp=False)


def make_prefill_step_cp(spec: GdnSpec, device: Device, *, deterministic: bool) -> PrefillStep:
    """Return the step on FlashInfer's kernel that cuts sequences, unless ``deterministic``."""
    return _make_step(spec, device, deterministic=deterministic, use_cp=not deterministic)


def _make_step(spec: GdnSpec, device: Device, *, deterministic: bool, use_cp: bool) -> PrefillStep:
    """Return the step: finished front end, chunks, norm and gate."""
    front_end = make_front_end(replace(spec, scale=1.0), device, finished=True)
    rule = make_rule(spec, device, Given.FINISHED, use_cp=use_cp)
    gated_rms_norm = make_gated_rms_norm(spec, device, deterministic=deterministic)
    return join_prefill(front_end, rule, gated_rms_norm)
