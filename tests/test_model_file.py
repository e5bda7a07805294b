# SPDX-License-Identifier: Apache-2.0
"""The demo's weights: what the shipped file holds, and what is said of a file that does not."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gdn_portable import ModelFileError
from gdn_portable.demo.model import (
    WEIGHTS,
    ByteLm,
    ByteLmConfig,
    load_model,
    model_provenance,
    save_model,
)

CPU = torch.device("cpu")
TINY = ByteLmConfig(
    num_layers=1, hidden_size=8, mlp_size=6, num_k_heads=1, num_v_heads=2, head_dim=4
)


def _tiny(seed: int = 0) -> ByteLm:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ByteLm(TINY, TINY.spec(torch.float32))


def _refusal(path: Path) -> str:
    with pytest.raises(ModelFileError) as caught:
        load_model(path, CPU, torch.float32)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_the_shipped_model_loads_and_is_small() -> None:
    model = load_model(WEIGHTS, CPU, torch.float32)

    assert WEIGHTS.stat().st_size <= 8_000_000
    assert not model.training
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_the_shipped_model_has_the_shape_every_vendors_kernels_take() -> None:
    spec = load_model(WEIGHTS, CPU, torch.bfloat16).spec

    assert (spec.head_k_dim, spec.head_v_dim) == (128, 128)
    assert spec.num_v_heads == 2 * spec.num_k_heads
    assert spec.conv_width == 4
    assert spec.dtype == torch.bfloat16
    assert spec.state_dtype == torch.float32


def test_the_shipped_model_says_where_it_comes_from() -> None:
    provenance = model_provenance(WEIGHTS)

    assert "Shakespeare" in provenance["source"]
    assert provenance["licence"] == "public domain"
    assert int(provenance["steps"]) > 0
    assert 0 < float(provenance["validation_loss"].split()[0]) < 2
    assert "config" not in provenance


@pytest.mark.parametrize("max_drafts", [1, 4])
def test_the_window_has_room_for_a_slot_table_of_the_drafts_asked_for(max_drafts: int) -> None:
    spec = load_model(WEIGHTS, CPU, torch.float32, max_drafts=max_drafts).spec

    assert spec.conv_state_len == 3 + max_drafts - 1


def test_a_model_that_is_saved_and_loaded_is_the_same_in_bfloat16(tmp_path: Path) -> None:
    model, path = _tiny(), tmp_path / "tiny.safetensors"

    save_model(model, path, {"source": "random", "steps": "0"})
    loaded = load_model(path, CPU, torch.float32)

    assert loaded.config == TINY
    assert model_provenance(path) == {"source": "random", "steps": "0"}
    saved = {name: tensor.bfloat16().float() for name, tensor in model.state_dict().items()}
    assert loaded.state_dict().keys() == saved.keys()
    assert all(torch.equal(loaded.state_dict()[name], saved[name]) for name in saved)


def test_a_model_that_is_saved_twice_is_the_same_file(tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"

    save_model(_tiny(), one, {"source": "random"})
    save_model(load_model(one, CPU, torch.bfloat16), two, {"source": "random"})

    first, second = load_file(one), load_file(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_missing_file_is_one_error(tmp_path: Path) -> None:
    assert "no model file at " in _refusal(tmp_path / "absent.safetensors")


def test_a_folder_is_one_error(tmp_path: Path) -> None:
    assert "is not a model of this demo" in _refusal(tmp_path)


@pytest.mark.parametrize("length", [0, 7, 1000, 1_000_000])
def test_a_truncated_file_is_one_error(tmp_path: Path, length: int) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(WEIGHTS.read_bytes()[:length])

    assert "is not a model of this demo" in _refusal(path)


@pytest.mark.parametrize("content", [b"hello, world", b"PK\x03\x04" + bytes(2000), b"\xff" * 4096])
def test_a_file_of_another_kind_is_one_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(content)

    assert "is not a model of this demo" in _refusal(path)


def test_a_file_without_a_config_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "bare.safetensors"
    save_file({"x": torch.zeros(2)}, path)

    message = _refusal(path)

    assert "is not a model of this demo" in message
    assert "config" in message


def test_a_file_of_other_tensors_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "tensors.safetensors"
    save_file({"x": torch.zeros(2)}, path, {"config": json.dumps(asdict(TINY))})

    assert "is not a model of this demo" in _refusal(path)


def test_tensors_of_another_shape_are_one_error(tmp_path: Path) -> None:
    path = tmp_path / "wide.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in _tiny().state_dict().items()}
    config = json.dumps({**asdict(TINY), "hidden_size": 16})
    save_file(tensors, path, {"config": config})

    assert "is not a model of this demo" in _refusal(path)


@pytest.mark.parametrize(
    "config",
    [
        "not json",
        "[]",
        "null",
        '{"num_layers": 1, "colour": "red"}',
        '{"num_k_heads": "two"}',
        '{"num_k_heads": 3}',
        '{"head_dim": 0}',
        '{"num_layers": -1}',
    ],
)
def test_a_config_of_another_model_is_one_error(tmp_path: Path, config: str) -> None:
    path = tmp_path / "config.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in _tiny().state_dict().items()}
    save_file(tensors, path, {"config": config})

    assert "is not a model of this demo" in _refusal(path)


def test_the_file_is_not_written_to() -> None:
    before = WEIGHTS.stat().st_mtime_ns

    with torch.no_grad():
        load_model(WEIGHTS, CPU, torch.bfloat16).embedding.weight.zero_()

    assert WEIGHTS.stat().st_mtime_ns == before
    with safe_open(WEIGHTS, framework="pt") as file:
        assert file.get_tensor("embedding.weight").any()
