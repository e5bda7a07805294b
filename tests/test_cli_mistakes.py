# SPDX-License-Identifier: Apache-2.0
"""Mistakes on the command line: exit code 2, one line on stderr, and nothing before it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gdn_portable.demo.model import WEIGHTS
from tests.command import QWEN3_NEXT, Command


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN3_NEXT))
    return path


@pytest.mark.parametrize("prompts", [[""], ["To be", ""]])
def test_an_empty_prompt(command: Command, prompts: list[str]) -> None:
    options = [option for prompt in prompts for option in ("--prompt", prompt)]

    line = command.mistake("demo", *options)

    assert line == f"error: prompt {len(prompts)} is empty, needs at least one byte\n"


def test_a_missing_model_file(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "absent.safetensors"

    assert command.mistake("demo", "--model", path) == f"error: no model file at {path}\n"


@pytest.mark.parametrize("length", [0, 1000, 2_000_000])
def test_a_truncated_model_file(command: Command, tmp_path: Path, length: int) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(WEIGHTS.read_bytes()[:length])

    assert f"{path} is not a model of this demo" in command.mistake("demo", "--model", path)


def test_a_model_file_of_another_kind(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    path.write_text("To be, or not to be")

    assert f"{path} is not a model of this demo" in command.mistake("demo", "--model", path)


def test_a_model_file_of_another_model(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(2)}, path, {"config": "{}"})

    assert f"{path} is not a model of this demo" in command.mistake("demo", "--model", path)


def test_a_folder_for_a_model(command: Command, tmp_path: Path) -> None:
    assert "is not a model of this demo" in command.mistake("demo", "--model", tmp_path)


def test_an_unknown_backend(command: Command) -> None:
    line = command.mistake("demo", "--backend", "referense")

    assert "no backend 'referense'; there is " in line
    assert "did you mean 'reference'?" in line


@pytest.mark.parametrize("name", ["demo", "doctor"])
@pytest.mark.parametrize("device", ["tpu", "cpu:x", "", "cuda:"])
def test_an_unknown_device(command: Command, name: str, device: str) -> None:
    assert f"device {device!r} cannot be used" in command.mistake(name, "--device", device)


def test_a_device_that_holds_no_values(command: Command) -> None:
    assert "'meta'" in command.mistake("demo", "--new-bytes", "2", "--device", "meta")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("name", ["demo", "doctor"])
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_device_that_is_not_here(command: Command, name: str, device: str) -> None:
    assert f"device {device!r} cannot be used: " in command.mistake(name, "--device", device)


def test_a_cpu_with_a_number_that_is_not_here(command: Command) -> None:
    line = command.mistake("demo", "--new-bytes", "2", "--device", "cpu:7")

    assert "cpu:7" in line


def test_a_device_and_an_architecture(command: Command) -> None:
    line = command.mistake("doctor", "--device", "cpu", "--arch", "sm90")

    assert line == "error: --device and --arch are both given, needs one\n"


@pytest.mark.parametrize("arch", ["hopper", "sm", "smx", "gfx", "SM90", "90", ""])
def test_an_unknown_architecture(command: Command, arch: str) -> None:
    line = command.mistake("doctor", "--arch", arch)

    assert f"arch is {arch!r}, needs cpu, sm90, sm100, gfx942, gfx950 or the like" in line


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"heads: 16"])
def test_a_config_that_is_no_json(command: Command, config: Path, content: bytes) -> None:
    config.write_bytes(content)

    line = command.mistake("doctor", "--config", config)

    assert f"config {config} cannot be read" in line


def test_a_config_that_is_not_there(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "absent.json"

    assert f"config {path} cannot be read" in command.mistake("doctor", "--config", path)
    assert f"config {tmp_path} cannot be read" in command.mistake("doctor", "--config", tmp_path)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"model_type": "llama"}, "linear_num_key_heads is None, needs an integer"),
        ([], "config has type list, needs a dict"),
        ({"text_config": 5}, "config has type int, needs a dict"),
        ({**QWEN3_NEXT, "linear_num_key_heads": 5}, "needs a multiple of num_k_heads (5)"),
        ({**QWEN3_NEXT, "linear_num_key_heads": 0}, "num_k_heads is 0, needs"),
        ({**QWEN3_NEXT, "linear_key_head_dim": "128"}, "linear_key_head_dim is '128', needs"),
        ({**QWEN3_NEXT, "torch_dtype": "float99"}, "dtype is 'float99', needs"),
        ({**QWEN3_NEXT, "torch_dtype": "int8"}, "dtype is torch.int8, needs"),
        ({**QWEN3_NEXT, "hidden_act": "gelu"}, "hidden_act is 'gelu', needs"),
    ],
)
def test_a_config_of_another_model(
    command: Command, config: Path, fields: object, problem: str
) -> None:
    config.write_text(json.dumps(fields))

    assert problem in command.mistake("doctor", "--config", config)


@pytest.mark.parametrize("tp_size", [3, 0, -2, 32])
def test_heads_that_do_not_divide(command: Command, config: Path, tp_size: int) -> None:
    with_config = command.mistake("doctor", "--config", config, "--tp-size", tp_size)
    without = command.mistake("doctor", "--tp-size", tp_size)

    expected = f"error: tp_size is {tp_size}, needs a divisor of num_k_heads (16) "
    assert with_config.startswith(expected)
    assert without.startswith(expected)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--max-drafts", "1"), "max_drafts is 1, needs at least 2"),
        (("--max-drafts", "-4"), "max_drafts is -4, needs at least 2"),
        (("--branches", "0"), "branches is 0, needs at least 1"),
        (("--branches", "2", "--protocol", "slot-table"), "a slot table holds a chain, got a tree"),
        (("--max-batch", "0"), "max_batch is 0, needs at least 1"),
        (("--new-bytes", "0"), "new_bytes is 0, needs at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_number_that_cannot_be(command: Command, options: tuple[str, ...], problem: str) -> None:
    assert problem in command.mistake("demo", "--prompt", "a", *options)


@pytest.mark.parametrize(
    "arguments",
    [
        ("demo", "--new-bytes", "many"),
        ("demo", "--temperature", "-1"),
        ("demo", "--temperature", "nan"),
        ("demo", "--protocol", "telepathy"),
        ("demo", "--mode", "fast"),
        ("demo", "--dtype", "int8"),
        ("demo", "--colour", "red"),
        ("demo", "a stray word"),
        ("doctor", "--tp-size", "two"),
        ("doctor", "--dtype", "fp8"),
        ("surgeon",),
    ],
    ids=" ".join,
)
def test_what_the_argument_parser_refuses(command: Command, arguments: tuple[str, ...]) -> None:
    outcome = command(*arguments)

    assert outcome.code == 2
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr
    assert arguments[-1] in outcome.stderr or "--" in outcome.stderr


def test_no_command_shows_the_help(command: Command) -> None:
    outcome = command()

    assert outcome.code in (0, 2)
    assert "demo" in outcome.stdout + outcome.stderr
    assert "doctor" in outcome.stdout + outcome.stderr


def test_a_kernel_to_time_that_names_no_op_where_cases_are_listed(command: Command) -> None:
    assert "kernel is 'foo', needs library.op" in command.mistake(
        "bench", "--list", "--kernels", "foo"
    )
