# SPDX-License-Identifier: Apache-2.0
"""How backends and kernels are chosen by hand: by argument, by environment, by a plugin."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from gdn_portable import (
    Device,
    Op,
    UnknownBackendError,
    UnsupportedError,
    get_backend,
    select,
)
from tests.fakes import HOPPER, SPEC, backend_of, install, reference_kernel

bind = partial(select.bind, check=False)

PLUGIN = """
from dataclasses import replace
from gdn_portable import Backend
from gdn_portable.reference import BACKEND as REFERENCE

BACKEND = Backend(
    name="vendor",
    devices=("xpu",),
    kernels=tuple(replace(k, name=f"vendor.{k.op.value}") for k in REFERENCE.kernels),
)
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install a distribution with a backend called vendor."""
    facts = tmp_path / "gdn_vendor-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: gdn-vendor\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(
        "[gdn_portable.backends]\nvendor = gdn_vendor_plugin:BACKEND\n"
    )
    (tmp_path / "gdn_vendor_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("gdn_vendor_plugin", None)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> str:
    """Install a backend called fake, whose table starts with decodes and a gating of its own."""
    decode, gating = reference_kernel(Op.RECURRENT_DECODE), reference_kernel(Op.GATING)
    monkeypatch.delenv(select.OVERRIDE_VARIABLE, raising=False)
    return install(
        monkeypatch,
        backend_of(
            replace(decode, name="fake.decode"),
            replace(decode, name="fake.slow_decode"),
            replace(decode, name="fake.hopper_decode", archs=("sm90",)),
            replace(gating, name="fake.gating"),
        ),
    )


def test_a_backend_is_chosen_by_argument(fake: str) -> None:
    kernels = bind(SPEC, "cpu", backend=fake).kernels

    assert kernels[Op.RECURRENT_DECODE] == "fake.decode"
    assert kernels[Op.CHUNK_PREFILL] == "reference.chunk_prefill"


@pytest.mark.parametrize("op", [Op.RECURRENT_DECODE, "recurrent_decode"], ids=["member", "name"])
def test_a_kernel_of_any_backend_is_chosen_by_argument(fake: str, op: Op | str) -> None:
    kernels = bind(SPEC, "cpu", kernels={op: "fake.slow_decode"}).kernels

    assert kernels[Op.RECURRENT_DECODE] == "fake.slow_decode"
    assert kernels[Op.GATING] == "reference.gating"


def test_a_backend_and_a_kernel_of_another_are_chosen_together(fake: str) -> None:
    kernels = bind(SPEC, "cpu", backend=fake, kernels={Op.GATING: "reference.gating"}).kernels

    assert kernels[Op.RECURRENT_DECODE] == "fake.decode"
    assert kernels[Op.GATING] == "reference.gating"


def test_a_kernel_that_is_chosen_and_unable_is_reported_and_not_replaced(fake: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        bind(SPEC, "cpu", backend=fake, kernels={Op.RECURRENT_DECODE: "fake.hopper_decode"})

    assert caught.value.rejected == {"fake.hopper_decode": ["arch is cpu, needs sm90"]}


def test_a_step_is_composed_of_the_kernels_that_were_chosen(fake: str) -> None:
    ops = bind(
        SPEC, HOPPER, backend="reference", kernels={Op.RECURRENT_DECODE: "fake.hopper_decode"}
    )

    assert ops.decode_step.keywords["recurrent_decode"] is ops.recurrent_decode  # type: ignore[attr-defined]
    assert ops.kernels[Op.RECURRENT_DECODE] == "fake.hopper_decode"


@pytest.mark.parametrize(
    ("value", "decode", "gating"),
    [
        ("", "reference.recurrent_decode", "reference.gating"),
        ("fake", "fake.decode", "fake.gating"),
        ("reference", "reference.recurrent_decode", "reference.gating"),
        ("recurrent_decode=fake.slow_decode", "fake.slow_decode", "reference.gating"),
        ("fake,gating=reference.gating", "fake.decode", "reference.gating"),
        (" gating = fake.gating , fake ,", "fake.decode", "fake.gating"),
        (
            "recurrent_decode=fake.slow_decode,gating=fake.gating",
            "fake.slow_decode",
            "fake.gating",
        ),
    ],
)
def test_the_environment_chooses_a_backend_and_kernels(
    fake: str, monkeypatch: pytest.MonkeyPatch, value: str, decode: str, gating: str
) -> None:
    monkeypatch.setenv("GDN_PORTABLE_KERNELS", value)

    kernels = bind(SPEC, "cpu").kernels

    assert (kernels[Op.RECURRENT_DECODE], kernels[Op.GATING]) == (decode, gating)


def test_the_environment_is_read_in_bind_and_not_later(
    fake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bind(SPEC, "cpu")
    monkeypatch.setenv("GDN_PORTABLE_KERNELS", fake)
    after = bind(SPEC, "cpu")

    assert before.kernels[Op.GATING] == "reference.gating"
    assert after.kernels[Op.GATING] == "fake.gating"


@pytest.mark.parametrize(
    ("backend", "kernels"), [("reference", None), (None, {Op.GATING: "reference.gating"})]
)
def test_an_argument_wins_over_the_environment(
    fake: str,
    monkeypatch: pytest.MonkeyPatch,
    backend: str | None,
    kernels: Mapping[Op | str, str] | None,
) -> None:
    monkeypatch.setenv("GDN_PORTABLE_KERNELS", fake)

    ops = bind(SPEC, "cpu", backend=backend, kernels=kernels)

    assert ops.kernels[Op.GATING] == "reference.gating"


@pytest.mark.parametrize(
    ("value", "message", "suggestion"),
    [
        ("faek", "no backend 'faek'", "did you mean 'fake'?"),
        ("recurent_decode=fake.decode", "no op 'recurent_decode'", "mean 'recurrent_decode'?"),
        (
            "recurrent_decode=fake.decod",
            "no recurrent_decode kernel 'fake.decod'",
            "did you mean 'fake.decode'?",
        ),
        ("gating=fake.decode", "no gating kernel 'fake.decode'", "there is fake.gating, refer"),
    ],
)
def test_a_misspelt_override_is_refused_with_a_suggestion(
    fake: str, monkeypatch: pytest.MonkeyPatch, value: str, message: str, suggestion: str
) -> None:
    monkeypatch.setenv("GDN_PORTABLE_KERNELS", value)

    with pytest.raises(UnknownBackendError) as caught:
        bind(SPEC, "cpu")

    assert message in str(caught.value)
    assert suggestion in str(caught.value)


def test_a_name_like_no_other_lists_what_there_is(fake: str) -> None:
    with pytest.raises(UnknownBackendError) as caught:
        bind(SPEC, "cpu", kernels={Op.GATING: "zzz"})

    assert (
        str(caught.value)
        == "no gating kernel 'zzz'; there is fake.gating, reference.gating, triton.gating"
    )


def test_a_plugin_is_found_by_its_name(plugin: None) -> None:
    ops = bind(SPEC, "cpu", backend="vendor")

    assert "vendor" in select.backend_names()
    assert get_backend("vendor").devices == ("xpu",)
    assert ops.kernels[Op.GATING] == "vendor.gating"


def test_a_plugin_is_the_default_of_a_device_that_nobody_else_serves(plugin: None) -> None:
    on_xpu, on_npu = (
        bind(SPEC, Device(kind, kind, 0)).kernels[Op.GATING] for kind in ("xpu", "npu")
    )

    assert (on_xpu, on_npu) == ("vendor.gating", "reference.gating")


def test_a_plugin_is_not_the_default_of_a_built_in_device(plugin: None) -> None:
    assert bind(SPEC, "cpu").kernels[Op.GATING] == "reference.gating"


def test_a_kernel_of_a_plugin_is_chosen_by_name(plugin: None) -> None:
    ops = bind(SPEC, "cpu", kernels={Op.GATING: "vendor.gating"})

    assert ops.kernels[Op.GATING] == "vendor.gating"
    assert ops.kernels[Op.RECURRENT_DECODE] == "reference.recurrent_decode"


def test_a_plugin_that_is_not_used_is_not_imported(plugin: None) -> None:
    bind(SPEC, "cpu")

    assert "gdn_vendor_plugin" not in sys.modules


def test_a_misspelt_plugin_is_suggested(plugin: None) -> None:
    with pytest.raises(UnknownBackendError, match="did you mean 'vendor'"):
        bind(SPEC, "cpu", backend="vendr")


def test_a_plugin_that_fails_to_import_is_not_passed_over(plugin: None, tmp_path: Path) -> None:
    (tmp_path / "gdn_vendor_plugin.py").write_text("raise ZeroDivisionError('broken plugin')")

    with pytest.raises(ZeroDivisionError, match="broken plugin"):
        bind(SPEC, "cpu", backend="vendor")


def test_a_plugin_that_cannot_be_imported_says_so(plugin: None, tmp_path: Path) -> None:
    (tmp_path / "gdn_vendor_plugin.py").write_text("import a_library_that_is_not_here\n")

    with pytest.raises(UnknownBackendError, match="backend 'vendor' cannot be loaded: No module"):
        bind(SPEC, "cpu", backend="vendor")


def test_the_environment_is_merged_under_the_argument(
    monkeypatch: pytest.MonkeyPatch, fake: str
) -> None:
    monkeypatch.setenv("GDN_PORTABLE_KERNELS", "recurrent_decode=reference.recurrent_decode")

    ops = bind(SPEC, "cpu", kernels={"decode_step": "composed.decode_step"})

    assert ops.kernels[Op.RECURRENT_DECODE] == "reference.recurrent_decode"
    assert ops.kernels[Op.DECODE_STEP] == "composed.decode_step"
