# SPDX-License-Identifier: Apache-2.0
"""How a spec is read from the configs of Qwen3-Next and Qwen3.5."""

from __future__ import annotations

import pytest
import torch

from gdn_portable import GdnSpec, SpecError

transformers = pytest.importorskip("transformers")

QWEN3_NEXT = {
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "hidden_act": "silu",
}


@pytest.mark.parametrize(
    "config",
    [
        transformers.Qwen3NextConfig(**QWEN3_NEXT, dtype="bfloat16"),
        transformers.Qwen3NextConfig(**QWEN3_NEXT, dtype=torch.bfloat16),
        transformers.Qwen3NextConfig(**QWEN3_NEXT, dtype="bfloat16").to_dict(),
        transformers.Qwen3_5TextConfig(**QWEN3_NEXT, dtype="bfloat16"),
        transformers.Qwen3_5Config(text_config=QWEN3_NEXT | {"dtype": "bfloat16"}),
        transformers.Qwen3_5Config(text_config=QWEN3_NEXT | {"dtype": "bfloat16"}).to_dict(),
        QWEN3_NEXT | {"torch_dtype": "bfloat16"},
        QWEN3_NEXT | {"dtype": "torch.bfloat16"},
        {"text_config": QWEN3_NEXT, "dtype": torch.bfloat16},
        {"text_config": QWEN3_NEXT | {"dtype": "bfloat16"}, "dtype": "float16"},
        {"text_config": transformers.Qwen3_5TextConfig(**QWEN3_NEXT, dtype="bfloat16")},
    ],
    ids=[
        "Qwen3NextConfig",
        "torch dtype",
        "dict",
        "Qwen3_5TextConfig",
        "Qwen3_5Config",
        "Qwen3_5Config dict",
        "torch_dtype",
        "torch. prefix",
        "outer dtype",
        "inner dtype wins",
        "dict of an object",
    ],
)
def test_a_config_is_read_whatever_its_form(config: object) -> None:
    spec = GdnSpec.from_config(config)

    assert spec == GdnSpec(
        num_k_heads=16,
        num_v_heads=32,
        head_k_dim=128,
        head_v_dim=128,
        dtype=torch.bfloat16,
        state_dtype=torch.float32,
    )


@pytest.mark.parametrize(
    ("fields", "activation"),
    [
        ({"output_gate_type": "sigmoid"}, "sigmoid"),
        ({"output_gate_type": "swish"}, "silu"),
        ({"output_gate_type": None}, "silu"),
        ({"hidden_act": "swish"}, "silu"),
    ],
    ids=str,
)
def test_the_gate_of_a_config_is_its_own_or_the_hidden_activation(
    fields: dict[str, object], activation: str
) -> None:
    spec = GdnSpec.from_config({"text_config": QWEN3_NEXT | {"dtype": "bfloat16"} | fields})

    assert (spec.activation, spec.gate_activation) == ("silu", activation)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"hidden_act": "gelu"}, "config hidden_act is 'gelu', needs 'silu'"),
        ({"output_gate_type": "tanh"}, "output_gate_type is 'tanh', needs 'silu' or 'sigmoid'"),
        ({"linear_allow_neg_eigval": True}, "linear_allow_neg_eigval is True, .* needs False"),
    ],
    ids=str,
)
def test_a_layer_that_computes_something_else_is_refused(
    fields: dict[str, object], reason: str
) -> None:
    with pytest.raises(SpecError, match=reason):
        GdnSpec.from_config(QWEN3_NEXT | fields)


def test_a_config_is_read_for_one_rank() -> None:
    spec = GdnSpec.from_config(QWEN3_NEXT | {"dtype": "float16"}, 8)

    assert (spec.num_k_heads, spec.num_v_heads, spec.dtype) == (2, 4, torch.float16)


def test_the_state_dtype_and_conv_width_of_a_config_are_honoured() -> None:
    config = QWEN3_NEXT | {"dtype": "float16", "mamba_ssm_dtype": "bfloat16"}

    spec = GdnSpec.from_config(config | {"linear_conv_kernel_dim": 3})

    assert (spec.state_dtype, spec.conv_width) == (torch.bfloat16, 3)


def test_an_argument_replaces_the_dtype_of_a_config() -> None:
    config = transformers.Qwen3NextConfig(**QWEN3_NEXT, dtype="bfloat16")

    assert GdnSpec.from_config(config, dtype=torch.float32).dtype is torch.float32


@pytest.mark.parametrize(
    "config", [QWEN3_NEXT, transformers.Qwen3NextConfig(**QWEN3_NEXT)], ids=["dict", "object"]
)
def test_a_config_without_dtype_gets_that_of_a_model_built_from_it(config: object) -> None:
    assert GdnSpec.from_config(config).dtype is torch.get_default_dtype()
    assert GdnSpec.from_config(config, dtype=torch.bfloat16).dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", ["auto", "bfloat17", 16])
def test_a_dtype_that_torch_does_not_know_is_reported(dtype: object) -> None:
    with pytest.raises(
        SpecError, match=f"config dtype is {dtype!r}, needs the name of a torch dtype"
    ):
        GdnSpec.from_config(QWEN3_NEXT | {"dtype": dtype})


@pytest.mark.parametrize("name", [name for name in QWEN3_NEXT if name.startswith("linear_")])
def test_a_missing_field_is_reported_by_its_name(name: str) -> None:
    config = {key: value for key, value in QWEN3_NEXT.items() if key != name}

    with pytest.raises(SpecError, match=f"config {name} is None, needs an integer"):
        GdnSpec.from_config(config, dtype=torch.bfloat16)


def test_a_config_of_another_architecture_is_refused() -> None:
    with pytest.raises(SpecError, match=r"linear_num_key_heads is None, .* not a GDN model"):
        GdnSpec.from_config(transformers.LlamaConfig(dtype="bfloat16"))


def test_a_config_that_is_no_config_is_refused() -> None:
    with pytest.raises(SpecError, match=r"config has type str, needs a dict or to_dict\(\)"):
        GdnSpec.from_config("Qwen/Qwen3-Next-80B-A3B-Instruct")


def test_a_config_whose_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(SpecError, match="tp_size is 5, needs a divisor of num_k_heads"):
        GdnSpec.from_config(QWEN3_NEXT, 5, dtype=torch.bfloat16)
