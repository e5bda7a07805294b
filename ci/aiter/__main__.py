# SPDX-License-Identifier: Apache-2.0
"""``python -m ci.aiter CHECKOUT --arch gfx950``: a line for every case of every adapter."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from gdn_backend_triton import installed_triton, is_before

from ci.aiter.checkout import open_checkout
from ci.aiter.hip import compiler, use_hip
from ci.amdgcn import simulated
from gdn_portable import ConvLayout, Device, GdnSpec, Op, StateLayout, UnsupportedCallError, bind
from gdn_portable.testing import Case, cases

MODEL = GdnSpec(
    num_k_heads=1,
    num_v_heads=2,
    head_k_dim=128,
    head_v_dim=128,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
    scratch_slot=24,
)
HALF_STATE = replace(MODEL, num_k_heads=2, num_v_heads=8, state_dtype=torch.bfloat16)
NARROW = replace(MODEL, head_k_dim=32, head_v_dim=32)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A kernel to run, or several that belong together, and the layers to run it with."""

    kernels: Mapping[Op | str, str]
    specs: tuple[GdnSpec, ...]
    archs: tuple[str, ...] = ("gfx942", "gfx950")


TRITON = Adapter(
    {
        Op.CHUNK_PREFILL: "aiter.chunk_gated_delta_rule_opt_vk",
        Op.PLAN_PREFILL: "aiter.plan_prefill",
    },
    (MODEL, replace(HALF_STATE, state_layout=StateLayout.KV)),
)
FLYDSL = Adapter(
    {Op.RECURRENT_DECODE: "aiter.flydsl_gdr_decode"},
    (MODEL, HALF_STATE, replace(MODEL, dtype=torch.float16)),
)
HIP_DECODE = Adapter(
    {Op.RECURRENT_DECODE: "aiter.gdr_decode_packed_bf16"},
    (replace(HALF_STATE, num_k_heads=8, num_v_heads=32),),
    archs=("gfx950",),
)
HIP_CONV = Adapter(
    {Op.CONV1D_UPDATE: "aiter.causal_conv1d_update"},
    (
        NARROW,
        replace(NARROW, conv_layout=ConvLayout.LEN_FIRST),
        replace(NARROW, dtype=torch.float16, conv_width=3),
        replace(NARROW, dtype=torch.float32, conv_width=2),
    ),
)


def main() -> None:
    """Run what can be run here; end with 1 where a case failed."""
    parser = argparse.ArgumentParser(prog="python -m ci.aiter")
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--arch", choices=("gfx942", "gfx950"), default="gfx942")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    open_checkout(asked.checkout.absolute(), asked.arch)
    failed = 0
    with simulated(asked.arch):
        for adapter in _runnable(asked.checkout, asked.arch):
            for spec in adapter.specs if asked.arch in adapter.archs else ():
                failed += sum(
                    not _passes(case, adapter, asked.arch) for case in _cases(spec, adapter)
                )
    sys.exit(bool(failed))


def _runnable(checkout: Path, arch: str) -> Iterator[Adapter]:
    """Yield the adapters whose kernels can be compiled here, and say what is not."""
    found = installed_triton()
    if found is not None and is_before(found[1], (3, 9)):
        yield TRITON
    else:
        print("Triton's kernels: passed over, need a Triton older than 3.9")
    if importlib.util.find_spec("flydsl") is None:
        print("FlyDSL's kernels: passed over, need flydsl 0.3.1")
    else:
        from ci.aiter.flydsl import use_flydsl

        use_flydsl(arch)
        yield FLYDSL
    if compiler() is None:
        print("HIP kernels: passed over, need clang++ 22")
    else:
        use_hip(checkout, arch)
        yield from (HIP_DECODE, HIP_CONV)


def _cases(spec: GdnSpec, adapter: Adapter) -> Iterator[Case]:
    for case in cases(spec):
        if case.op not in adapter.kernels or "deferred" in case.arguments:
            continue
        arguments = dict(case.arguments)
        if "dt_bias" in arguments:
            arguments["dt_bias"] = arguments["dt_bias"].to(spec.dtype)
        if adapter is HIP_CONV:  # which takes windows of W - 1 columns alone
            axis = 2 if spec.conv_layout is ConvLayout.DIM_FIRST else 1
            window = arguments["conv_state"].narrow(axis, 0, spec.conv_width - 1)
            arguments["conv_state"] = window
            case = replace(case, spec=spec)
        yield replace(case, arguments=arguments)


def _passes(case: Case, adapter: Adapter, arch: str) -> bool:
    ops = bind(case.spec, Device("rocm", arch), kernels=adapter.kernels, check=False)
    ops = replace(ops, device=Device("cpu", "cpu"))
    passed, result = True, ""
    try:
        result = f"passes with {case.check(ops):.2f} of what is allowed"
    except UnsupportedCallError as error:
        result = f"refused: {error}"
    except AssertionError as error:
        passed, result = False, f"FAILS: {error}"
    dtypes = f"{case.spec.dtype}, {case.spec.state_dtype} state"
    print(f"{adapter.kernels[case.op]}, {dtypes}, {case.name}: {result}", flush=True)
    return passed


if __name__ == "__main__":
    main()
