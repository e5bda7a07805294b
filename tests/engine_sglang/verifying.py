# SPDX-License-Identifier: Apache-2.0
"""Drafts, verified by the shim and committed by SGLang, are as good as tokens decoded in turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.hybrid_linear_attn_backend import HybridLinearAttnBackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.kits.attention_unittest.attention_methods.gdn_attention import GDN_ATOL, GDN_RTOL
from sglang.test.kits.attention_unittest.runner_modes import speculative_target_verify_runner as kit
from torch import Tensor

from tests.cases import bits
from tests.engine_sglang.layer import (
    DEVICE,
    SLOTS,
    make_layer,
    pools,
    prepare_graph,
    run,
    run_eagerly,
)

pytestmark = pytest.mark.usefixtures("deterministic")
P = 3
ACCEPTED = (0, 2, 1)  # the last draft of each request that is right
BRANCHES = ((0,), (0, 2), (0, 1))  # what is accepted of a tree of a root and its two children


def make_verifier(topk: int) -> Any:
    """Return a layer whose requests have a chain or tree of drafts, and buffers of NaN for them."""
    layer = make_layer(ForwardMode.TARGET_VERIFY, (P,) * 3)
    layer.backend.linear_attn_backend.topk = topk
    kit._prepare_spec_verify_batch(
        layer.case, layer.forward_batch, topk=topk, spec_kind="eagle", device=DEVICE
    )
    kept = _kept(layer)
    for buffer in (kept.intermediate_conv_window[0], kept.intermediate_ssm):
        buffer.fill_(float("nan"))
    return layer


def _kept(layer: Any) -> Any:
    return layer.runner.req_to_token_pool.mamba2_layer_cache(0)


def _commit(layer: Any, steps: Tensor) -> None:
    """Let SGLang commit: with its kernels on a GPU, else with its eager form of them."""
    if DEVICE == "cuda":
        layer.backend.update_mamba_state_after_mtp_verify(steps, None, None, None)
        return
    kept, (windows, states) = _kept(layer), pools(layer)
    slots = layer.backend.linear_attn_backend.forward_metadata.mamba_cache_indices[: len(steps)]
    pairs = ((windows, kept.intermediate_conv_window[0]), (states, kept.intermediate_ssm))
    for pool, buffer in pairs:
        HybridLinearAttnBackend._scatter_speculative_state_with_mask(
            pool[None], buffer[None], slots, steps
        )


def _decoder(layer: Any, path: tuple[tuple[int, ...], ...], step: int) -> Any:
    """Return a decode of the token that each request accepts at ``step``, where it has one."""
    going = [i for i, drafts in enumerate(path) if step < len(drafts)]
    decoder = make_layer(
        ForwardMode.DECODE,
        (1,) * len(going),
        prefixes=(3,) * len(going),
        slots=[SLOTS[i] for i in going],
    )
    rows = [i * P + path[i][step] for i in going]
    for name in ("mixed_qkv", "a", "b"):
        setattr(decoder, name, getattr(layer, name)[rows])
    decoder.actual_module.load_state_dict(layer.actual_module.state_dict())
    return decoder


@pytest.mark.parametrize(
    ("topk", "path"),
    [(1, tuple(tuple(range(last + 1)) for last in ACCEPTED)), (2, BRANCHES)],
    ids=["chain", "tree"],
)
def test_a_committed_draft_leaves_what_decodes_leave(
    topk: int, path: tuple[tuple[int, ...], ...]
) -> None:
    layer = make_verifier(topk)
    decoded = [pool.clone() for pool in pools(layer)]

    o = run_eagerly(layer)
    _commit(layer, torch.tensor([drafts[-1] for drafts in path], device=DEVICE))

    for step in range(max(map(len, path))):
        decoder = _decoder(layer, path, step)
        for pool, values in zip(pools(decoder), decoded, strict=True):
            pool.copy_(values)
        rows = [i * P + drafts[step] for i, drafts in enumerate(path) if step < len(drafts)]
        torch.testing.assert_close(o[rows], run_eagerly(decoder), atol=GDN_ATOL, rtol=GDN_RTOL)
        decoded = [pool.clone() for pool in pools(decoder)]
    (windows, states), (want_windows, want_states) = pools(layer), decoded
    assert torch.equal(bits(windows), bits(want_windows))
    torch.testing.assert_close(states, want_states, atol=GDN_ATOL, rtol=GDN_RTOL, equal_nan=True)


@pytest.mark.parametrize("topk", [1, 2], ids=["chain", "tree"])
def test_a_verify_in_a_padded_graph_writes_the_rows_of_its_drafts_alone(topk: int) -> None:
    plain, padded = make_verifier(topk), make_verifier(topk)
    before = [pool.clone() for pool in pools(padded)]
    prepare_graph(padded, 5, tokens=P)

    want, got = run_eagerly(plain), run(padded)

    assert torch.equal(bits(got[: 3 * P]), bits(want))
    assert not got[3 * P :].any()
    kept, plain_kept = _kept(padded), _kept(plain)
    buffers = (kept.intermediate_conv_window[0], kept.intermediate_ssm)
    wanted = (plain_kept.intermediate_conv_window[0], plain_kept.intermediate_ssm)
    for buffer, other in zip(buffers, wanted, strict=True):
        assert torch.equal(bits(buffer[:3]), bits(other[:3]))
        assert buffer[3:].isnan().all()
    for pool, old in zip(pools(padded), before, strict=True):
        assert torch.equal(bits(pool), bits(old))
