# SPDX-License-Identifier: Apache-2.0
"""The comparison of a Hugging Face model in use with the same model as it is, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from gdn_portable.bench import hugging_face

SMALL = {
    **hugging_face.SIZES,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "vocab_size": 64,
}


def test_the_command_reports_tokens_and_times_of_both(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(hugging_face, "SIZES", SMALL)
    monkeypatch.setattr(hugging_face, "LOADS", (hugging_face.Load(2, 20),))
    path = tmp_path / "out.json"

    hugging_face.main(["--device", "cpu", "--groups", "1", "--repeats", "1", "--json", str(path)])

    report, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert report["tokens"] == {"compared": 128, "same": 128}
    assert report["kernels"]["decode_step"] == "composed.decode_step"
    rows = [(row["of"], row["step"]) for row in report["milliseconds"]]
    assert rows == [(of, step) for of in ("layer", "model") for step in ("prefill", "decode")]
    assert all(min(row["as it is"], row["in use"]) > 0 for row in report["milliseconds"])
    assert "greedy tokens, float32: 128 of 128 the same" in printed
    assert "model decode 2 x 20" in printed


def test_a_device_that_is_not_here_is_said_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        hugging_face.main(["--device", "cuda:99"])

    assert end.value.code == 2
    assert "error: device 'cuda:99' cannot be used: " in capsys.readouterr().err
