# SPDX-License-Identifier: Apache-2.0
"""What vLLM's metadata, rows or caches get wrong is refused before any cache is touched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gdn_portable import InputError, bind
from gdn_portable.engines.vllm import VllmGdn, vllm_spec
from tests.mixed_engine import BF16, NUM_SLOTS, Row, refusal
from tests.test_engine_vllm import CPU, NUM_SPEC, GDNAttentionMetadata, caches, engine_of

WRONG = {
    "no slots": ({"non_spec_state_indices_tensor": None}, "None, needs a tensor"),
    "few slots": ({"non_spec_state_indices_tensor": torch.tensor([1])}, "1 entries, needs .* 2"),
    "a slot that is not there": (
        {"non_spec_state_indices_tensor": torch.tensor([1, NUM_SLOTS])},
        "needs",
    ),
    "no flags": ({"has_initial_state": None}, "has_initial_state is None, needs"),
    "tokens and decodes": ({"num_decode_tokens": 3}, "is 3, needs num_decodes"),
    "offsets": ({"non_spec_query_start_loc": torch.tensor([0, 1])}, "2 entries, needs .* 3"),
    "offsets that go back": ({"non_spec_query_start_loc": torch.tensor([0, 1, 0])}, "needs"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_batch_is_refused_before_its_first_part_runs(
    changes: dict[str, Any], message: str
) -> None:
    engine = engine_of(CPU)
    one, new = engine.request(1, 2, 3), engine.request(15, 14, 13)
    engine.serve(Row(one, 4))

    refusal(engine, message, Row(one), Row(new, 3), **changes)


WRONG_DRAFTS = {
    "no table": ({"spec_state_indices_tensor": None}, "is None, needs a tensor"),
    "a vector": ({"spec_state_indices_tensor": torch.tensor([1])}, r"\[1\], needs .*drafts"),
    "too many drafts": (
        {"spec_state_indices_tensor": torch.tensor([[1, 2, 3, 4]])},
        "at most 3 drafts: windows have 5 columns",
    ),
    "no counts": ({"num_accepted_tokens": None}, "num_accepted_tokens is None, needs"),
    "no row numbers": ({"spec_token_indx": None}, "spec_token_indx is None, needs"),
    "rows of nobody": (
        {"num_prefills": 0, "num_decodes": 2, "num_decode_tokens": 2},
        "non_spec_token_indx has 3 rows, needs 2 of decodes",
    ),
    "a row twice": ({"spec_token_indx": torch.tensor([0, 0, 2])}, "need each of 0 to 5 once"),
    "a slot of the prefill": (
        {"spec_state_indices_tensor": torch.tensor([[1, 2, 15]])},
        "slot 15 is written for one sequence and used for another, needs",
    ),
    "a slot that is not there": (
        {"spec_state_indices_tensor": torch.tensor([[1, 2, NUM_SLOTS]])},
        "needs",
    ),
}


@pytest.mark.parametrize(("changes", "message"), WRONG_DRAFTS.values(), ids=WRONG_DRAFTS)
def test_wrong_drafts_are_refused_before_the_first_part_runs(
    changes: dict[str, Any], message: str
) -> None:
    engine = engine_of(CPU)
    one, new = engine.request(1, 2, 3), engine.request(15, 14, 13)
    engine.serve(Row(one, 4))

    refusal(engine, message, Row(one, 3, right=1), Row(new, 3), **changes)


@pytest.mark.parametrize("short", range(4))
def test_rows_that_are_missing_are_refused(short: int) -> None:
    vllm = VllmGdn(bind(vllm_spec(BF16), "cpu"))
    HV, V, D = BF16.num_v_heads, BF16.head_v_dim, BF16.conv_dim
    shapes = ((D,), (HV,), (HV,), (HV, V))
    rows = [torch.zeros(2 if i == short else 3, *shape) for i, shape in enumerate(shapes)]
    metadata = GDNAttentionMetadata(
        0, 0, 3, 3, 0, 0, 3, non_spec_state_indices_tensor=torch.tensor([1, 2, 3])
    )
    layer = SimpleNamespace(
        kv_cache=caches(vllm.ops.spec, "cpu"),
        conv1d=SimpleNamespace(weight=torch.zeros(D, 1, 4), bias=None),
        A_log=torch.zeros(HV),
        dt_bias=torch.zeros(HV),
        norm=None,
    )

    with pytest.raises(InputError, match="has 2 rows, needs the 3 of the batch"):
        vllm.forward_core(*rows, layer=layer, metadata=metadata)


def test_a_norm_whose_gate_is_not_the_spec_s_is_refused() -> None:
    engine = engine_of(CPU, gated=True)
    engine.layer.norm.activation = "sigmoid"

    refusal(
        engine,
        "has activation 'sigmoid', needs the spec's gate_activation, 'silu'",
        Row(engine.request(1, 2, 3), 3),
    )


def test_caches_in_another_layout_or_dtype_are_refused() -> None:
    vllm = VllmGdn(bind(vllm_spec(BF16, num_spec=NUM_SPEC), "cpu"))
    conv_state, state = caches(vllm.ops.spec, "cpu")

    with pytest.raises(InputError, match=r"conv_state is \[16, 64, 5\].*needs \[slots, 5, 64\]"):
        vllm.pool((conv_state.mT, state))
    with pytest.raises(InputError, match=r"state is .*bfloat16, needs .*float32"):
        vllm.pool((conv_state, state.bfloat16()))


def test_a_spec_without_a_null_block_is_refused() -> None:
    with pytest.raises(InputError, match="pad_slot is -1, needs the null block, 0"):
        VllmGdn(bind(BF16, "cpu"))
    with pytest.raises(InputError, match="'HND', needs 'SD' or 'DS'"):
        vllm_spec(BF16, conv_state_layout="HND")  # type: ignore[arg-type]
