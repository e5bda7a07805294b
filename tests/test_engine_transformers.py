# SPDX-License-Identifier: Apache-2.0
"""Hugging Face models in use write what they wrote before, from the same caches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from gdn_portable import GdnError, InputError, UnsupportedCallError
from gdn_portable.engines.transformers import use

pytest.importorskip("transformers")
from transformers import (
    CompileConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    StaticCache,
)

if TYPE_CHECKING:
    from ci.amdgcn import Simulator

# the distance between two orders of summing in float32, transformers' own and ours
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)

PAD = 0
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_hidden_layers": 3,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "eos_token_id": None,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}


def _qwen4_exp() -> Any:
    """Return one whose cache keeps two more windows of a layer, and whose gate is a sigmoid."""
    new = pytest.importorskip("transformers.models.qwen4_exp", reason="transformers is too old")
    sizes = {
        **SIZES,
        **EXPERTS,
        "eos_token_id": 1,
        "output_gate_type": "sigmoid",
        "hc_count": 2,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [3],
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 100,
        "split_ngram_parts": 1,
    }
    del sizes["intermediate_size"]
    return new.Qwen4ExpForCausalLM(new.Qwen4ExpTextConfig(**sizes))


def _lara_mini() -> Any:
    new = pytest.importorskip("transformers.models.lara_mini", reason="transformers is too old")
    return new.LaraMiniForCausalLM(new.LaraMiniConfig(**SIZES, **EXPERTS))


MODELS: dict[str, Callable[[], Any]] = {
    "Qwen3-Next": lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**SIZES, **EXPERTS)),
    "Qwen3.5": lambda: Qwen3_5ForCausalLM(Qwen3_5TextConfig(**SIZES)),
    "Qwen3.5 MoE": lambda: Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**SIZES, **EXPERTS)),
    "Qwen4-Exp": _qwen4_exp,
    "Lara Mini": _lara_mini,
}
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)
BOTH_PROJECTIONS = pytest.mark.parametrize("name", ["Qwen3-Next", "Qwen3.5"])


def _model(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for module in model.modules():
        if hasattr(module, "dt_bias"):
            nn.init.normal_(module.dt_bias)
            nn.init.normal_(module.norm.weight)
    return model


def _prompts(length: int) -> tuple[Tensor, Tensor]:
    """Return two prompts, the second 5 tokens shorter and padded on its left, and their mask."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(PAD + 1, SIZES["vocab_size"], (2, length), generator=generator)
    ids[1, :5] = PAD
    return ids, (ids != PAD).long()


def _generated(model: Any, length: int = 70, **options: Any) -> Tensor:
    ids, mask = _prompts(length)
    options = {"max_new_tokens": 8, "do_sample": False, **options}
    tokens: Tensor = model.generate(ids, attention_mask=mask, **options)
    return tokens


def _layer(model: Any) -> Any:
    """Return the last layer of a model that is not attention's."""
    return model.model.layers[2].linear_attn


@EVERY_MODEL
def test_greedy_tokens_are_those_of_the_model_not_in_use(name: str) -> None:
    model = _model(name)
    expected = _generated(model)

    with use(model) as in_use:
        tokens = _generated(model)

    assert {ops.device.kind for ops in in_use.ops} == {"cpu"}
    assert tokens.tolist() == expected.tolist()


@pytest.mark.parametrize("function", ["torch_chunk_gated_delta_rule", "causal_conv1d_update"])
def test_nothing_that_transformers_replaces_by_gpu_libraries_is_called(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{function}: 0 active drivers")

    model = _model("Qwen3-Next")
    expected = _generated(model, 9)
    monkeypatch.setattr(f"{type(_layer(model)).__module__}.{function}", fail)

    with pytest.raises(RuntimeError, match="0 active drivers"):
        _generated(model, 9)
    with use(model):
        tokens = _generated(model, 9)

    assert tokens.tolist() == expected.tolist()


@BOTH_PROJECTIONS
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"prefill_chunk_size": 16},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_generate_takes_its_options_as_before(name: str, options: dict[str, Any]) -> None:
    model = _model(name)
    torch.manual_seed(2)
    expected = _generated(model, 20, **options)

    with use(model):
        torch.manual_seed(2)
        tokens = _generated(model, 20, **options)

    assert tokens.tolist() == expected.tolist()


@BOTH_PROJECTIONS
@pytest.mark.parametrize("kept_by", ["prefill in use", "decode in use"])
@torch.no_grad()
def test_a_cache_passes_between_a_model_in_use_and_one_that_is_not(name: str, kept_by: str) -> None:
    model, (ids, _) = _model(name), _prompts(20)
    cache, mixed = DynamicCache(config=model.config), DynamicCache(config=model.config)
    steps = [ids[:, :12], ids[:, 12:13], ids[:, 13:]]
    expected = [model(step, past_key_values=cache).logits for step in steps]

    logits = []
    for i, step in enumerate(steps):
        in_use = use(model) if (i % 2 == 0) == (kept_by == "prefill in use") else None
        logits.append(model(step, past_key_values=mixed).logits)
        if in_use is not None:
            in_use.undo()

    close(logits, expected, rtol=1e-3, atol=1e-3)


@BOTH_PROJECTIONS
@torch.no_grad()
def test_outputs_and_states_of_a_layer_agree_wherever_padding_is(name: str) -> None:
    model = _model(name)
    layer, generator = _layer(model), torch.Generator().manual_seed(3)
    parts = [torch.randn(3, T, SIZES["hidden_size"], generator=generator) for T in (70, 1, 6, 1)]
    masks: list[Tensor | None] = [torch.ones(3, part.shape[1]) for part in parts]
    masks[0][0, :5], masks[0][1, 66:], masks[2][2, 1:3], masks[3] = 0, 0, 0, None
    theirs, ours = DynamicCache(config=model.config), DynamicCache(config=model.config)
    pairs = list(zip(parts, masks, strict=True))

    expected = [layer(x, cache_params=theirs, attention_mask=mask) for x, mask in pairs]
    with use(model):
        outputs = [layer(x, cache_params=ours, attention_mask=mask) for x, mask in pairs]

    close(outputs, expected)
    kept, needed = ours.layers[layer.layer_idx], theirs.layers[layer.layer_idx]
    close(kept.recurrent_states[0], needed.recurrent_states[0])
    close(kept.conv_states[0][..., 1:], needed.conv_states[0][..., 1:])


@pytest.mark.parametrize("name", ["cache", "cache_params"])
@torch.no_grad()
def test_a_layer_takes_its_cache_by_either_name_and_in_its_place(name: str) -> None:
    model, x = _model("Qwen3.5"), torch.randn(2, 5, SIZES["hidden_size"])
    named, placed = (DynamicCache(config=model.config) for _ in range(2))

    with use(model):
        outputs = [(_layer(model)(x, **{name: named}), _layer(model)(x, placed)) for _ in range(2)]

    assert all(torch.equal(*pair) for pair in outputs)
    assert not torch.equal(outputs[0][0], outputs[1][0])


@torch.no_grad()
def test_the_tensors_of_a_cache_are_written_in_place() -> None:
    model, (ids, _) = _model("Qwen3.5"), _prompts(9)
    cache = DynamicCache(config=model.config)

    def states() -> list[Tensor]:
        kept = cache.layers[2]
        return [kept.conv_states[0], kept.recurrent_states[0]]

    with use(model):
        model(ids, past_key_values=cache)
        before, values = states(), [x.clone() for x in states()]
        model(ids[:, :1], past_key_values=cache)
        model(ids, past_key_values=cache)

    assert [x is y for x, y in zip(before, states(), strict=True)] == [True, True]
    assert [x.equal(y) for x, y in zip(values, states(), strict=True)] == [False, False]


@torch.no_grad()
def test_a_cache_that_was_reset_starts_again() -> None:
    model, (ids, mask) = _model("Qwen3.5"), _prompts(9)
    cache = StaticCache(model.config, max_cache_len=32)

    with use(model):
        first = model(ids, attention_mask=mask, past_key_values=cache).logits
        cache.reset()
        again = model(ids, attention_mask=mask, past_key_values=cache).logits

    assert again.equal(first)


def test_generate_compiles_a_model_in_use_without_a_break() -> None:
    model = _model("Qwen3-Next")
    expected = _generated(model, 9, max_new_tokens=4)
    config = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    config._compile_all_devices = True

    with use(model):
        tokens = _generated(
            model, 9, max_new_tokens=4, cache_implementation="static", compile_config=config
        )

    assert model._last_compile_config is config
    assert tokens.tolist() == expected.tolist()


def test_gradients_on_a_cpu_are_those_of_the_layer_not_in_use() -> None:
    model = _model("Qwen3-Next")
    layer = _layer(model)
    x = torch.randn(2, 9, SIZES["hidden_size"], generator=torch.Generator().manual_seed(3))

    def gradients() -> dict[str, Tensor]:
        layer.zero_grad()
        layer(x).square().sum().backward()
        return {name: weight.grad for name, weight in layer.named_parameters()}

    expected = gradients()
    with use(model), torch.inference_mode():
        layer(x)
        with torch.inference_mode(False):
            found = gradients()

    close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_simulated_amd_gpu_writes_the_same_tokens(
    amd_gpu: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ci.amdgcn import bind_simulated

    model = _model("Qwen3-Next")
    expected = _generated(model, 9, max_new_tokens=4)
    monkeypatch.setattr(
        "gdn_portable.engines.transformers.bind",
        lambda spec, device, **options: bind_simulated(spec, "gfx942"),
    )

    with use(model):
        tokens = _generated(model, 9, max_new_tokens=4)

    assert amd_gpu.launches
    assert tokens.tolist() == expected.tolist()


def test_the_weights_and_forwards_of_a_model_are_its_own_again() -> None:
    model = _model("Qwen3-Next")
    layers = [_layer(model), model.model.layers[0].linear_attn]

    def addresses() -> dict[str, int]:
        return {name: weight.data_ptr() for name, weight in model.state_dict().items()}

    expected = addresses()

    with pytest.raises(KeyError), use(model) as in_use:
        replaced = [vars(layer).get("forward") for layer in layers]
        in_use_at = addresses()
        raise KeyError
    in_use.undo()

    assert None not in replaced
    assert ["forward" in vars(layer) for layer in layers] == [False, False]
    assert in_use_at == addresses() == expected


def test_what_is_in_use_counts_its_layers_and_names_what_they_run_on() -> None:
    with use(_model("Qwen3.5")) as in_use:
        during = repr(in_use)

    (ops,) = in_use.ops
    assert during == f"InUse(2 layers: {ops})"
    assert repr(in_use) == f"InUse(0 layers: {ops})"


def test_a_hook_that_moves_inputs_to_a_layers_device_stays() -> None:
    model = _model("Qwen3.5")
    layer, calls = _layer(model), list[str]()
    expected = _generated(model, 9)

    def hooked(*args: Any, **kwargs: Any) -> Tensor:
        calls.append("hook")
        output: Tensor = layer._old_forward(*args, **kwargs)
        return output

    # as accelerate hooks the layers of a model on several devices
    layer._hf_hook, layer._old_forward, layer.forward = object(), layer.forward, hooked
    with use(model):
        in_use = layer._old_forward
        tokens = _generated(model, 9)

    assert tokens.tolist() == expected.tolist()
    assert calls
    assert layer.forward is hooked
    assert layer._old_forward.__func__ is type(layer).forward is not in_use


def test_a_forward_that_was_wrapped_since_is_not_undone() -> None:
    model = _model("Qwen3.5")
    in_use = use(model)
    _layer(model).forward = partial(_layer(model).forward)

    with pytest.raises(InputError, match="forward of layer 2 was replaced since"):
        in_use.undo()

    assert "forward" in vars(model.model.layers[0].linear_attn)


def test_a_model_that_is_in_use_already_is_refused() -> None:
    model = _model("Qwen3.5")

    with use(model), pytest.raises(InputError, match="layer 0 is replaced already"):
        use(model)


def test_a_model_without_known_layers_is_refused() -> None:
    class OlmoHybridGatedDeltaNet(nn.Module):
        pass

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 16}

    with pytest.raises(InputError, match="model has no GDN layer, needs a layer of class Qwen3N"):
        use(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1)))
    with pytest.raises(InputError, match="model has OlmoHybridGatedDeltaNet, needs a layer"):
        use(nn.Sequential(OlmoHybridGatedDeltaNet()))


def test_a_layer_whose_cache_has_another_name_is_refused() -> None:
    class Qwen3_5GatedDeltaNet(nn.Module):
        layer_idx = 5

        def forward(self, hidden_states: Tensor, memory: Any = None) -> Tensor:
            return hidden_states

    with pytest.raises(
        InputError,
        match=(
            "the forward of layer 5 takes self, hidden_states, memory, needs cache or cache_params"
        ),
    ):
        use(nn.Sequential(Qwen3_5GatedDeltaNet()))


def test_a_model_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = MODELS["Qwen3.5"]()

    with pytest.raises(InputError, match="layer 0 is on the meta device"):
        use(model)


def _with_packed_rows(model: Any, ids: Tensor) -> None:
    model(ids, cu_seq_lens_q=torch.tensor([0, 4, 18]))


def _under_autocast(model: Any, ids: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids)


def _in_another_dtype(model: Any, ids: Tensor) -> None:
    model.to(torch.bfloat16)(ids)


def _with_a_cache_of_attention(model: Any, ids: Tensor) -> None:
    model(ids, past_key_values=DynamicCache())


def _with_a_cache_of_another_batch(model: Any, ids: Tensor) -> None:
    cache = DynamicCache(config=model.config)
    model(ids[:1], past_key_values=cache)
    _layer(model)(torch.zeros(2, 3, SIZES["hidden_size"]), cache_params=cache)


def _with_a_cache_that_records(model: Any, ids: Tensor) -> None:
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(ids, past_key_values=cache)


@pytest.mark.parametrize(
    ("call", "error", "reason"),
    [
        (_with_packed_rows, UnsupportedCallError, "cu_seq_lens_q is given"),
        (_under_autocast, UnsupportedCallError, "autocast is on"),
        (_in_another_dtype, InputError, "projections are torch.bfloat16, needs torch.float32"),
        (_with_a_cache_of_attention, InputError, "keeps NoneType of GDN layer 0, needs states"),
        (_with_a_cache_of_another_batch, InputError, r"are \(1, 128, 3\) of torch.float32, needs"),
        (_with_a_cache_that_records, UnsupportedCallError, "records past states"),
    ],
)
@torch.no_grad()
def test_what_cannot_be_served_is_refused_with_a_reason(
    call: Callable[[Any, Tensor], None], error: type[GdnError], reason: str
) -> None:
    model, (ids, _) = _model("Qwen3.5"), _prompts(9)

    with use(model), pytest.raises(error, match=reason):
        call(model, ids)
