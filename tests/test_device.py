# SPDX-License-Identifier: Apache-2.0
"""Devices are detected by vendor and architecture, with no GPU needed to test it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gdn_portable import Device, InputError, detect_device
from tests.fakes import CPU, MI300


@pytest.mark.parametrize(
    ("major", "minor", "arch"), [(9, 0, "sm90"), (10, 0, "sm100"), (10, 3, "sm103")]
)
def test_an_nvidia_gpu_is_named_by_its_compute_capability(
    monkeypatch: pytest.MonkeyPatch, major: int, minor: int, arch: str
) -> None:
    properties = SimpleNamespace(major=major, minor=minor, name="NVIDIA Test")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", None)

    assert detect_device("cuda:1") == Device("cuda", arch, 1, "NVIDIA Test")
    assert detect_device(torch.device("cuda")) == Device("cuda", arch, None, "NVIDIA Test")


@pytest.mark.parametrize("name", ["gfx942:sramecc+:xnack-", "gfx942:sramecc+", "gfx942"])
def test_an_amd_gpu_is_told_from_nvidia_and_named_without_its_features(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    properties = SimpleNamespace(major=9, minor=4, gcnArchName=name, name="AMD Test")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", "7.0.0")

    assert detect_device("cuda:0") == replace(MI300, name="AMD Test")


def test_the_facts_of_a_device_are_taken_as_they_are() -> None:
    assert detect_device(MI300) is MI300
    assert detect_device("cpu") == detect_device(torch.device("cpu")) == CPU


@pytest.mark.parametrize(
    ("device", "name"),
    [
        (CPU, "cpu"),
        (Device("cpu", "cpu", 0), "cpu:0"),
        (Device("cuda", "sm90"), "cuda (sm90)"),
        (MI300, "rocm:0 (gfx942)"),
    ],
)
def test_a_device_is_named_as_reports_do(device: Device, name: str) -> None:
    assert str(device) == name


@pytest.mark.parametrize("kind", ["cpu", "xpu"])
def test_a_device_without_an_architecture_has_its_kind_for_one(kind: str) -> None:
    assert Device(kind).arch == kind


@pytest.mark.parametrize("device", ["npu-1", "cuda:99", None, 3.5, torch.device("cuda", 99)])
def test_a_device_that_torch_cannot_use_is_one_clear_error(device: Any) -> None:
    with pytest.raises(InputError, match=f"^device is {device}, needs one that torch can use: "):
        detect_device(device)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("xpu", AssertionError("Torch not compiled with XPU enabled")),
        ("mps", NotImplementedError("Could not run 'aten::empty' on MPS")),
        ("hpu", ModuleNotFoundError("No module named 'torch.hpu'")),
    ],
)
def test_a_device_that_torch_names_and_cannot_allocate_on_is_refused(
    monkeypatch: pytest.MonkeyPatch, kind: str, error: Exception
) -> None:
    def fail(*size: int, device: torch.device) -> None:
        raise error

    monkeypatch.setattr(torch, "empty", fail)

    with pytest.raises(InputError, match=f"^device is {kind}, needs .* torch can use: {error}"):
        detect_device(kind)


@pytest.mark.parametrize("device", ["rocm", "rocm:1"])
def test_rocm_is_no_device_of_torchs(device: str) -> None:
    with pytest.raises(InputError, match=f"^device is {device}, .*: it calls AMD's GPUs cuda$"):
        detect_device(device)
