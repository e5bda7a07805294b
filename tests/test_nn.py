# SPDX-License-Identifier: Apache-2.0
"""The layer as model code: its weights, and the same outputs as Hugging Face's layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdn_portable import (
    GdnSpec,
    PrefillMetadata,
    ReplayDrafts,
    SnapshotDrafts,
    StatePool,
    VerifyMetadata,
    select,
)
from gdn_portable.metadata import Drafts
from gdn_portable.nn import GatedDeltaNet

pytest.importorskip("transformers")
from transformers import DynamicCache, Qwen3_5TextConfig, Qwen3NextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextGatedDeltaNet,
)

bind = partial(select.bind, check=False)
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)

HIDDEN = 32


def _qwen4_exp() -> tuple[Any, Any]:
    name = "transformers.models.qwen4_exp.modeling_qwen4_exp"
    new = pytest.importorskip(name, reason="transformers is too old")
    config_of = partial(new.Qwen4ExpTextConfig, output_gate_type="sigmoid")
    return config_of, new.Qwen4ExpTextGatedDeltaNet


LAYERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "Qwen3-Next": lambda: (Qwen3NextConfig, Qwen3NextGatedDeltaNet),
    "Qwen3.5": lambda: (Qwen3_5TextConfig, Qwen3_5GatedDeltaNet),
    "Qwen4-Exp": _qwen4_exp,
}
MODELS = pytest.mark.parametrize("model", LAYERS)
RATIOS = pytest.mark.parametrize("ratio", [1, 2, 4])


@dataclass(slots=True)
class Pair:
    """Hugging Face's layer, and ours with its weights."""

    config: Any
    theirs: Any
    ours: GatedDeltaNet


def _pair(model: str, ratio: int) -> Pair:
    """Build a small layer with random weights, the ones that start as ones included."""
    torch.manual_seed(0)
    config_of, layer_of = LAYERS[model]()
    config = config_of(
        hidden_size=HIDDEN,
        linear_num_key_heads=2,
        linear_num_value_heads=2 * ratio,
        linear_key_head_dim=16,
        linear_value_head_dim=8,
        linear_conv_kernel_dim=4,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        dtype="float32",
    )
    theirs = layer_of(config, 0)
    nn.init.normal_(theirs.norm.weight)
    nn.init.normal_(theirs.dt_bias)
    ours = GatedDeltaNet(GdnSpec.from_config(config), HIDDEN, norm_eps=config.rms_norm_eps)
    ours.load_state_dict(theirs.state_dict())
    return Pair(config, theirs, ours)


def _per_sequence(layer: Any, sequences: list[Tensor], caches: list[Any]) -> Tensor:
    """Run Hugging Face's layer on each sequence as a batch of one, and pack its outputs."""
    outputs = [layer(x[None], cache)[0] for x, cache in zip(sequences, caches, strict=True)]
    return torch.cat(outputs)


def _packed(sequences: list[Tensor], slots: Tensor) -> PrefillMetadata:
    lengths = [len(x) for x in sequences]
    return PrefillMetadata(torch.tensor([0, *lengths]).cumsum(0), slots)


@MODELS
@RATIOS
@torch.no_grad()
def test_prefill_and_decode_agree_with_hugging_face(model: str, ratio: int) -> None:
    pair = _pair(model, ratio)
    prompts = [torch.randn(length, HIDDEN) for length in (1, 5, 63, 64, 70)]
    tokens = torch.randn(3, len(prompts), HIDDEN)
    caches = [DynamicCache(config=pair.config) for _ in prompts]
    ops, pool = bind(pair.ours.spec, "cpu"), StatePool.allocate(pair.ours.spec, 7, "cpu")
    slots = torch.tensor([6, 0, 3, 1, 5])

    theirs = [_per_sequence(pair.theirs, prompts, caches)]
    theirs += [_per_sequence(pair.theirs, list(step[:, None]), caches) for step in tokens]
    batch = _packed(prompts, slots)
    ours = [pair.ours.prefill(torch.cat(prompts), ops, pool, metadata=batch)]
    ours += [pair.ours.decode(step, ops, pool, state_indices=slots) for step in tokens]

    close(ours, theirs)


@MODELS
@torch.no_grad()
def test_a_prompt_in_two_parts_agrees_with_hugging_face_on_the_whole(model: str) -> None:
    pair = _pair(model, ratio=2)
    prompts = [torch.randn(length, HIDDEN) for length in (66, 4, 130)]
    ops, pool = bind(pair.ours.spec, "cpu"), StatePool.allocate(pair.ours.spec, 3, "cpu")
    slots = torch.tensor([2, 0, 1])

    theirs = _per_sequence(pair.theirs, prompts, [None, None, None])
    first, second = [x[:3] for x in prompts], [x[3:] for x in prompts]
    outputs = [
        pair.ours.prefill(torch.cat(part), ops, pool, metadata=_packed(part, slots))
        for part in (first, second)
    ]

    heads, tails = outputs[0].split(3), outputs[1].split([len(x) for x in second])
    close(torch.cat([x for pieces in zip(heads, tails, strict=True) for x in pieces]), theirs)


@MODELS
@torch.no_grad()
def test_a_packed_batch_agrees_with_hugging_faces_padded_one(model: str) -> None:
    pair = _pair(model, ratio=2)
    lengths = torch.tensor([70, 3, 64])
    padded = torch.randn(3, 70, HIDDEN)
    real = torch.arange(70) < lengths[:, None]
    ops, pool = bind(pair.ours.spec, "cpu"), StatePool.allocate(pair.ours.spec, 3, "cpu")
    batch = PrefillMetadata(torch.tensor([0, 70, 73, 137]), torch.tensor([0, 1, 2]))

    theirs = pair.theirs(padded, attention_mask=real)
    ours = pair.ours.prefill(padded[real], ops, pool, metadata=batch)

    close(ours, theirs[real])


@MODELS
def test_loading_leaves_the_state_dict_of_the_caller_as_it_was(model: str) -> None:
    pair = _pair(model, ratio=2)
    state_dict = pair.theirs.state_dict()
    keys = list(state_dict)

    pair.ours.load_state_dict(state_dict)

    assert list(state_dict) == keys


@MODELS
def test_a_key_that_is_unknown_is_reported(model: str) -> None:
    pair = _pair(model, ratio=2)
    state_dict = pair.theirs.state_dict() | {"in_proj_x.weight": torch.zeros(1)}

    with pytest.raises(
        RuntimeError, match=r'Unexpected key\(s\) in state_dict: "in_proj_x.weight"'
    ):
        pair.ours.load_state_dict(state_dict)


@pytest.mark.parametrize(
    ("model", "missing"),
    [
        ("Qwen3-Next", "A_log"),
        ("Qwen3-Next", "norm.weight"),
        ("Qwen3-Next", "in_proj_ba.weight"),
        ("Qwen3-Next", "in_proj_qkvz.weight"),
        ("Qwen3.5", "dt_bias"),
        ("Qwen3.5", "out_proj.weight"),
        ("Qwen3.5", "in_proj_qkv.weight"),
        ("Qwen3.5", "in_proj_a.weight"),
    ],
)
def test_a_key_that_is_missing_is_reported(model: str, missing: str) -> None:
    pair = _pair(model, ratio=2)
    state_dict = pair.theirs.state_dict()
    del state_dict[missing]

    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict"):
        pair.ours.load_state_dict(state_dict)


@pytest.mark.parametrize(
    ("model", "wrong"),
    [
        ("Qwen3-Next", "conv1d.weight"),
        ("Qwen3-Next", "in_proj_qkvz.weight"),
        ("Qwen3.5", "conv1d.weight"),
        ("Qwen3.5", "in_proj_z.weight"),
    ],
)
def test_a_weight_of_another_shape_is_reported(model: str, wrong: str) -> None:
    pair = _pair(model, ratio=2)
    state_dict = pair.theirs.state_dict()
    state_dict[wrong] = state_dict[wrong][:-1]

    with pytest.raises(RuntimeError, match="size mismatch for "):
        pair.ours.load_state_dict(state_dict)


def test_loading_that_is_not_strict_returns_the_keys_that_do_not_fit() -> None:
    pair = _pair("Qwen3.5", ratio=2)
    state_dict = pair.theirs.state_dict() | {"bias": torch.zeros(1)}
    del state_dict["A_log"]

    result = pair.ours.load_state_dict(state_dict, strict=False)

    assert (result.missing_keys, result.unexpected_keys) == (["A_log"], ["bias"])


def test_a_layer_loads_its_own_state_dict() -> None:
    torch.manual_seed(0)
    spec = _pair("Qwen3.5", ratio=2).ours.spec
    source, target = GatedDeltaNet(spec, HIDDEN), GatedDeltaNet(spec, HIDDEN)

    target.load_state_dict(source.state_dict())

    close(dict(target.state_dict()), dict(source.state_dict()), rtol=0, atol=0)


@MODELS
def test_a_layer_inside_a_model_loads_by_its_prefix(model: str) -> None:
    pair = _pair(model, ratio=2)
    theirs = nn.ModuleDict({"linear_attn": pair.theirs, "mlp": nn.Linear(2, 2)})
    ours = nn.ModuleDict(
        {"linear_attn": GatedDeltaNet(pair.ours.spec, HIDDEN), "mlp": nn.Linear(2, 2)}
    )

    nn.ModuleList([ours]).load_state_dict(nn.ModuleList([theirs]).state_dict())

    loaded = ours["linear_attn"].state_dict()
    close(dict(loaded), dict(pair.ours.state_dict()), rtol=0, atol=0)
    close(ours["mlp"].weight, theirs["mlp"].weight)


@MODELS
@pytest.mark.parametrize("assign", [False, True], ids=["to_empty", "assign"])
@torch.no_grad()
def test_a_layer_made_on_the_meta_device_is_loaded_later(model: str, assign: bool) -> None:
    pair = _pair(model, ratio=2)
    with torch.device("meta"):
        ours = GatedDeltaNet(pair.ours.spec, HIDDEN)
    on_meta = {parameter.device.type for parameter in ours.parameters()}
    ours = ours if assign else ours.to_empty(device="cpu")

    ours.load_state_dict(pair.theirs.state_dict(), assign=assign)

    assert on_meta == {"meta"}
    close(dict(ours.state_dict()), dict(pair.ours.state_dict()), rtol=0, atol=0)


def test_a_layer_holds_its_projections_in_the_activations_dtype_and_its_decay_in_float32() -> None:
    spec = replace(_pair("Qwen3.5", ratio=2).ours.spec, dtype=torch.bfloat16)

    dtypes = {
        name: weight.dtype for name, weight in GatedDeltaNet(spec, HIDDEN).state_dict().items()
    }

    assert dtypes == {
        "A_log": torch.float32,
        "dt_bias": torch.float32,
        "in_proj.weight": torch.bfloat16,
        "conv1d.weight": torch.bfloat16,
        "norm.weight": torch.bfloat16,
        "out_proj.weight": torch.bfloat16,
    }


def test_a_new_layer_draws_decay_rates_and_time_steps_in_their_ranges() -> None:
    torch.manual_seed(0)
    spec = replace(_pair("Qwen3.5", ratio=4).ours.spec, num_k_heads=64, num_v_heads=512)

    layer = GatedDeltaNet(spec, HIDDEN)

    rates, steps = layer.A_log.exp(), F.softplus(layer.dt_bias)
    assert 0.01 <= rates.min() < 0.5 and 15 < rates.max() <= 16
    assert 0.999e-3 <= steps.min() < 2e-3 and 0.09 < steps.max() <= 0.1001


@pytest.mark.parametrize("protocol", ["replay", "snapshot", "slot table"])
@torch.no_grad()
def test_verify_and_commit_agree_with_decode(protocol: str) -> None:
    pair = _pair("Qwen3.5", ratio=2)
    spec = replace(pair.ours.spec, conv_window=5)
    ops, slots = bind(spec, "cpu"), torch.tensor([3, 0])
    prompt, tokens = torch.randn(9, HIDDEN), torch.randn(2, 3, HIDDEN)
    batch = PrefillMetadata(torch.tensor([0, 4, 9]), slots)
    decoded, verified = (StatePool.allocate(spec, 8, "cpu") for _ in range(2))
    protocols: dict[str, Drafts | None] = {
        "replay": ReplayDrafts.allocate(spec, 8, 3, "cpu"),
        "snapshot": SnapshotDrafts.allocate(spec, 2, 3, "cpu"),
        "slot table": None,
    }
    drafts = protocols[protocol]
    table = torch.tensor([[3, 4, 5], [0, 1, 2]])
    drafted = VerifyMetadata(table if drafts is None else slots, max_drafts=3)
    for pool in (decoded, verified):
        pair.ours.prefill(prompt, ops, pool, metadata=batch)

    expected = [pair.ours.decode(tokens[:, t], ops, decoded, state_indices=slots) for t in range(3)]
    outputs = pair.ours.verify(tokens.flatten(0, 1), ops, verified, metadata=drafted, drafts=drafts)

    close(outputs.unflatten(0, (2, 3)), torch.stack(expected, dim=1))


@pytest.mark.parametrize("protocol", ["replay", "snapshot"])
@pytest.mark.parametrize("accepted", [0, 1, 2, 3])
@torch.no_grad()
def test_decode_after_a_commit_continues_from_the_accepted_drafts(
    protocol: str, accepted: int
) -> None:
    pair = _pair("Qwen3-Next", ratio=2)
    spec, slots = pair.ours.spec, torch.tensor([3, 0])
    ops = bind(spec, "cpu")
    prompt, tokens = torch.randn(9, HIDDEN), torch.randn(2, 3, HIDDEN)
    batch = PrefillMetadata(torch.tensor([0, 4, 9]), slots)
    decoded, verified = (StatePool.allocate(spec, 4, "cpu") for _ in range(2))
    protocols: dict[str, Drafts] = {
        "replay": ReplayDrafts.allocate(spec, 4, 3, "cpu"),
        "snapshot": SnapshotDrafts.allocate(spec, 2, 3, "cpu"),
    }
    drafts = protocols[protocol]
    drafted, next_token = VerifyMetadata(slots, max_drafts=3), torch.randn(2, HIDDEN)
    for pool in (decoded, verified):
        pair.ours.prefill(prompt, ops, pool, metadata=batch)

    for t in range(accepted):
        pair.ours.decode(tokens[:, t], ops, decoded, state_indices=slots)
    pair.ours.verify(tokens.flatten(0, 1), ops, verified, metadata=drafted, drafts=drafts)
    last = torch.full((2,), accepted - 1)
    ops.mtp_commit(verified, drafts, metadata=drafted, last_accepted=last)
    expected, output = (
        pair.ours.decode(next_token, ops, pool, state_indices=slots) for pool in (decoded, verified)
    )

    close(output, expected)
    close(verified.state, decoded.state)
    close(verified.conv_state, decoded.conv_state)
