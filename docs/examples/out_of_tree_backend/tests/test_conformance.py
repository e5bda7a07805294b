# SPDX-License-Identifier: Apache-2.0
"""The backend passes the cases that every backend has to pass."""

from dataclasses import replace

import pytest
import torch

from gdn_portable import GdnSpec, Op, UnsupportedCallError, UnsupportedError, bind
from gdn_portable.testing import Case, cases

SPEC = GdnSpec(
    num_k_heads=1,
    num_v_heads=2,
    head_k_dim=16,
    head_v_dim=16,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
)
SPECS = (SPEC, replace(SPEC, dtype=torch.float16, state_dtype=torch.bfloat16, pad_slot=0))
CASES = [case for spec in SPECS for case in cases(spec)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_passes(case: Case) -> None:
    # unchecked, as an engine binds it on a GPU
    ops = bind(case.spec, "cpu", backend="einsum", check=False)
    if "deferred" in case.arguments:
        with pytest.raises(UnsupportedCallError, match="writes every state"):
            case.check(ops)
        return
    case.check(ops)


def test_its_decode_serves_and_is_part_of_the_step() -> None:
    kernels = bind(SPEC, "cpu", backend="einsum").kernels

    assert kernels[Op.RECURRENT_DECODE] == "einsum.recurrent_decode"
    assert kernels[Op.DECODE_STEP] == "composed.decode_step"
    assert kernels[Op.CHUNK_PREFILL] == "reference.chunk_prefill"


def test_a_kv_pool_goes_to_the_reference_as_the_table_says() -> None:
    spec = replace(SPEC, state_layout="KV")

    kernels = bind(spec, "cpu", backend="einsum").kernels

    assert kernels[Op.RECURRENT_DECODE] == "reference.recurrent_decode"
    with pytest.raises(UnsupportedError, match="state layout is KV, needs VK"):
        bind(spec, "cpu", kernels={"recurrent_decode": "einsum.recurrent_decode"})
