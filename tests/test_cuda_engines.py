# SPDX-License-Identifier: Apache-2.0
"""On a GPU: compiled code runs the kernels as a node each, and Hugging Face models run on them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch

from gdn_portable import GdnOps, GdnSpec, InputError, StatePool, bind, custom_ops
from gdn_portable.engines.transformers import use
from gdn_portable.nn import GatedDeltaNet
from gdn_portable.testing import ABSOLUTE, cases

if not torch.cuda.is_available():
    pytest.skip("needs a GPU, torch sees none", allow_module_level=True)

SPEC = GdnSpec(
    num_k_heads=2,
    num_v_heads=4,
    head_k_dim=128,
    head_v_dim=128,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
    conv_window=6,
)
CASES = {case.name: case for case in cases(SPEC)}
STEPS = [name for name, case in CASES.items() if case.op.value.endswith(("_step", "_commit"))]
HIDDEN = 256


@cache
def _ops() -> GdnOps:
    return custom_ops.register(bind(SPEC, "cuda"), custom_ops.free_name("tested"))


@pytest.mark.parametrize("name", STEPS)
def test_a_case_passes_traced_whole(name: str) -> None:
    torch._dynamo.reset()
    case, ops = CASES[name], _ops()
    launch = getattr(ops, case.op.value)
    traced = torch.compile(
        lambda arguments: launch(**arguments), fullgraph=True, backend="aot_eager"
    )

    case.check(replace(ops, **{case.op.value: lambda **arguments: traced(arguments)}))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@torch.no_grad()
def test_layers_compiled_by_inductor_decode_as_they_do_eagerly(mode: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    ops, slots = _ops(), torch.tensor([5, 2, -1], device="cuda")
    with torch.device("cuda"):
        layers = [GatedDeltaNet(SPEC, HIDDEN) for _ in range(2)]
        tokens = torch.randn(6, 3, HIDDEN).to(SPEC.dtype)
    pools, expected = ([StatePool.allocate(SPEC, 8, "cuda") for _ in layers] for _ in range(2))
    for pool in pools:
        torch._dynamo.mark_static_address(pool.conv_state)
        torch._dynamo.mark_static_address(pool.state)

    def decode(x: torch.Tensor, pools: list[StatePool]) -> torch.Tensor:
        for layer, pool in zip(layers, pools, strict=True):
            x = x + layer.decode(x, ops, pool, state_indices=slots)
        return x

    compiled = torch.compile(decode, fullgraph=True, mode=mode)
    outputs = [(compiled(x, pools).clone(), decode(x, expected)) for x in tokens]

    for output, wanted in outputs:
        error = (output - wanted).abs().max()
        assert error <= 2 * ABSOLUTE[SPEC.dtype] * wanted.abs().max()
    for pool, other in zip(pools, expected, strict=True):
        error = (pool.state - other.state).abs().max()
        assert error <= 2 * ABSOLUTE[SPEC.dtype] * other.state.abs().max()


def _model(dtype: torch.dtype, layer_types: list[str]) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3NextConfig(
        vocab_size=256,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        layer_types=layer_types,
        num_hidden_layers=len(layer_types),
        num_experts=0,
        initializer_range=0.1,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return transformers.Qwen3NextForCausalLM(config).to(dtype).eval()


HYBRID = ["linear_attention", "full_attention", "linear_attention"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 2},
        {"cache_implementation": "static", "disable_compile": True},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 32},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_a_model_in_use_writes_the_greedy_tokens_of_the_model_as_it_is(
    options: dict[str, Any],
) -> None:
    model = _model(torch.float32, HYBRID)
    ids = torch.randint(1, 256, (3, 90), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, **options}
    plain = {**options, "disable_compile": True}
    expected = model.generate(ids, **plain)

    with use(model) as in_use:
        tokens = model.generate(ids, **options)

    assert in_use.ops[0].device.kind != "cpu"
    assert tokens.tolist() == expected.tolist()


@torch.no_grad()
def test_a_graph_of_a_layer_replays_and_keeps_its_batch_to_itself() -> None:
    model = _model(torch.bfloat16, HYBRID)
    layer, x = model.model.layers[2].linear_attn, torch.randn(3, 4, HIDDEN, device="cuda")
    prompts, tokens = x.to(torch.bfloat16), x[:, -1:].to(torch.bfloat16)
    transformers = pytest.importorskip("transformers")
    captured, eager, other = (transformers.DynamicCache(config=model.config) for _ in range(3))
    graph = torch.cuda.CUDAGraph()

    with use(model):
        for cache, B in ((captured, 3), (eager, 3), (other, 2)):
            layer(prompts[:B], cache_params=cache)
        layer(tokens[:2], cache_params=other)  # compiles what is captured, for another batch
        with torch.cuda.graph(graph):
            output = layer(tokens, cache_params=captured)
        expected = layer(tokens, cache_params=eager)
        graph.replay()

    close = partial(
        torch.testing.assert_close, rtol=ABSOLUTE[output.dtype], atol=ABSOLUTE[output.dtype]
    )
    close(output, expected)
    close(captured.layers[2].recurrent_states[0], eager.layers[2].recurrent_states[0])


def test_gradients_are_refused_where_the_kernels_have_none() -> None:
    model = _model(torch.bfloat16, HYBRID)

    with use(model), pytest.raises(InputError, match="the kernels have none: needs torch"):
        model(torch.ones(1, 4, dtype=torch.long, device="cuda"))
