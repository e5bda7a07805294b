# SPDX-License-Identifier: Apache-2.0
"""The commands: what they print, in words and as JSON, and that mistakes are one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gdn_portable import Op, select
from gdn_portable.demo.model import WEIGHTS
from tests.command import QWEN3_NEXT, Command

SHORT = ("demo", "--new-bytes", "12", "--prompt", "ROMEO\tO", "--prompt", "x")
STEPS = ("prefill_step", "decode_step", "verify_step")
KERNELS = {op.value: f"{'composed' if op.value in STEPS else 'reference'}.{op.value}" for op in Op}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN3_NEXT))
    return path


def _program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_demo_as_json_holds_texts_rates_and_kernels(command: Command) -> None:
    document = command.document(*SHORT)

    plain, speculative = document["runs"]["plain"], document["runs"]["speculative"]
    assert document["speculative_equals_plain"] is True
    assert plain["texts"] == speculative["texts"]
    assert [len(text.encode()) for text in plain["texts"]] == [12, 12]
    assert plain["accepted_length"] == 1
    assert speculative["accepted_length"] >= 1
    assert plain["tokens_per_second"] > 0
    assert speculative["tokens_per_second"] > 0
    assert document["kernels"] == KERNELS
    assert document["prompts"] == ["ROMEO\tO", "x"]
    assert document["device"] == "cpu"
    assert document["model"]["licence"] == "public domain"
    assert document["speculation"] == {"protocol": "replay", "max_drafts": 6, "branches": 1}


@pytest.mark.parametrize(
    "options",
    [
        ("--protocol", "snapshot", "--branches", "2"),
        ("--protocol", "slot-table", "--max-drafts", "3"),
        ("--temperature", "0.8", "--seed", "-3", "--max-batch", "1"),
        ("--dtype", "bf16"),
        ("--backend", "reference"),
    ],
    ids=lambda options: options[0].strip("-") + " " + options[1],
)
def test_demo_writes_the_same_bytes_whatever_the_options(
    command: Command, options: tuple[str, ...]
) -> None:
    assert command.document(*SHORT, *options)["speculative_equals_plain"] is True


@pytest.mark.parametrize("mode", ["plain", "speculative"])
def test_demo_of_one_mode_has_nothing_to_compare(command: Command, mode: str) -> None:
    document = command.document(*SHORT, "--mode", mode)

    assert list(document["runs"]) == [mode]
    assert document["speculative_equals_plain"] is None


def test_demo_in_words_shows_texts_rates_kernels_and_the_verdict(command: Command) -> None:
    text = command.document(*SHORT)["runs"]["plain"]["texts"][0]

    outcome = command(*SHORT)

    assert outcome.code == 0
    assert [kernel for kernel in KERNELS.values() if kernel not in outcome.stdout] == []
    assert "Speculative decoding wrote the same bytes as plain decoding." in outcome.stdout
    assert text.split()[0] in outcome.stdout
    assert "tokens per second" in outcome.stdout
    assert "accepted length" in outcome.stdout


def test_demo_shows_progress_where_nothing_streams(command: Command) -> None:
    outcome = command(*SHORT, "--json")

    assert "plain decoding" in outcome.stderr
    assert "24/24 bytes" in outcome.stderr


def test_a_kernel_named_by_the_environment_is_the_one_reported(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(select.OVERRIDE_VARIABLE, "gating=reference.gating")

    assert command.document(*SHORT, "--mode", "plain")["kernels"] == KERNELS


def test_a_kernel_named_by_the_environment_that_is_not_there_is_a_mistake(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(select.OVERRIDE_VARIABLE, "gating=reference.gatting")

    assert "did you mean 'reference.gating'?" in command.mistake(*SHORT)


def test_doctor_reports_the_present_device(command: Command) -> None:
    document = command.document("doctor", "--device", "cpu")

    assert document["device"] == {"kind": "cpu", "arch": "cpu", "index": None, "name": ""}
    assert document["default_backend"] == "reference"
    assert document["versions"]["torch"] == torch.__version__
    assert document["spec"]["num_v_heads"] == 32
    choices = document["backends"]["reference"]
    assert {choice["op"]: choice["kernel"] for choice in choices} == KERNELS
    assert all(choice["chosen"] and choice["reasons"] == [] for choice in choices)
    assert document["serves"] == KERNELS
    assert document[select.OVERRIDE_VARIABLE] is None


@pytest.mark.parametrize(("arch", "kind"), [("sm90", "cuda"), ("gfx942", "rocm"), ("cpu", "cpu")])
def test_doctor_explains_a_device_that_is_not_here(command: Command, arch: str, kind: str) -> None:
    document = command.document("doctor", "--arch", arch)

    assert document["device"] == {"kind": kind, "arch": arch, "index": None, "name": ""}
    chosen = [
        choice["op"]
        for choice in document["backends"][document["default_backend"]]
        if choice["chosen"]
    ]
    assert chosen == [op.value for op in Op]


def test_doctor_says_what_the_environment_makes_serve(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    override = "reference,conv1d_update=triton.conv1d_update"
    monkeypatch.setenv(select.OVERRIDE_VARIABLE, override)

    document = command.document("doctor", "--arch", "gfx942")
    lines = command("doctor", "--arch", "gfx942").stdout.splitlines()

    assert document[select.OVERRIDE_VARIABLE] == override
    assert document["serves"]["decode_step"] == "composed.decode_step"
    assert document["serves"]["conv1d_update"] == "triton.conv1d_update"
    assert f"{select.OVERRIDE_VARIABLE}={override}" in [line.strip() for line in lines]
    assert [line for line in lines if "triton.conv1d_update" in line and "serves" in line]
    assert not [line for line in lines if "triton.decode_step" in line]


def test_doctor_refuses_what_the_environment_misspells(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(select.OVERRIDE_VARIABLE, "refrence")

    assert "did you mean 'reference'?" in command.mistake("doctor", "--arch", "gfx942")


def test_doctor_reads_a_config_and_divides_its_heads(command: Command, config: Path) -> None:
    spec = command.document("doctor", "--config", config, "--tp-size", "4")["spec"]

    assert (spec["num_k_heads"], spec["num_v_heads"]) == (4, 8)
    assert (spec["head_k_dim"], spec["head_v_dim"], spec["conv_width"]) == (128, 128, 4)
    assert (spec["dtype"], spec["state_dtype"]) == ("torch.bfloat16", "torch.float32")


def test_doctor_takes_the_dtype_that_is_named(command: Command, config: Path) -> None:
    spec = command.document("doctor", "--config", config, "--dtype", "fp16")["spec"]

    assert spec["dtype"] == "torch.float16"


def test_doctor_in_words_names_every_op_kernel_and_version(command: Command) -> None:
    outcome = command("doctor", "--device", "cpu")

    assert outcome.code == 0
    assert "backend reference (default here)" in outcome.stdout
    assert torch.__version__ in outcome.stdout
    assert [name for name in (*KERNELS, *KERNELS.values()) if name not in outcome.stdout] == []


def test_doctor_in_words_has_a_line_for_every_other_backend(command: Command) -> None:
    lines = command("doctor", "--device", "cpu").stdout.splitlines()

    for name in ("triton", "rocm", "cuda"):
        (line,) = (line for line in lines if f"backend {name} " in line)
        assert "could serve 0 of 13 ops: device is cpu, needs " in line


def test_doctor_in_words_says_that_a_device_is_not_here_and_shows_all(command: Command) -> None:
    text = command("doctor", "--arch", "gfx942", "--all").stdout

    assert "rocm (gfx942), imagined; libraries are those that are installed here" in text
    assert "backend rocm (default there)" in text
    assert [name for name in ("triton.gating", *KERNELS.values()) if name not in text] == []


def test_the_module_runs_as_a_program() -> None:
    ended = _program("-m", "gdn_portable", "doctor", "--device", "cpu", "--json")

    assert ended.returncode == 0
    assert json.loads(ended.stdout)["device"]["kind"] == "cpu"
    assert ended.stderr == ""


def test_a_mistake_is_one_line_of_the_program() -> None:
    ended = _program("-m", "gdn_portable", "demo", "--prompt", "")

    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == "error: prompt 1 is empty, needs at least one byte\n"


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_a_missing_package_is_named_with_what_to_install(package: str) -> None:
    hide_and_run = f"""
import sys
class Absent:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent)
sys.argv = ["gdn-portable", "doctor"]
from gdn_portable.__main__ import main
main()
"""

    ended = _program("-c", hide_and_run)

    assert ended.returncode != 0
    assert ended.stdout == ""
    assert ended.stderr == (
        f"error: {package} is not installed, needs: pip install 'gdn-portable[cli]'; "
        "in a checkout: pip install '.[cli]'\n"
    )


def test_a_model_of_ones_own_is_read(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "copy.safetensors"
    path.write_bytes(WEIGHTS.read_bytes())

    assert command.document(*SHORT, "--mode", "plain", "--model", path)["runs"]


def test_a_prompt_need_not_be_utf_8(command: Command) -> None:
    # what Python makes of the byte 0xff on a command line
    document = command.document("demo", "--new-bytes", "2", "--prompt", "\udcff")

    assert document["prompts"] == ["\N{REPLACEMENT CHARACTER}"]
    assert document["speculative_equals_plain"] is True
