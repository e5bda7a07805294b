# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's adapters without a GPU: what they do on a double, and when they step aside."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gdn_backend_cuda import BACKEND

from gdn_portable import Choice, Device, GdnSpec, Op, StateLayout, UnsupportedError, bind, explain
from tests.command import Command
from tests.libraries import Site

HOPPER = Device("cuda", "sm90")
SPEC = GdnSpec(
    num_k_heads=2,
    num_v_heads=4,
    head_k_dim=128,
    head_v_dim=128,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
    scratch_slot=3,
)
CHUNK = "flashinfer.chunk_prefill"
ROOT = Path(__file__).parents[1]


def test_the_adapters_keep_the_contract_on_a_double() -> None:
    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip(f"Triton is {triton.__version__}: 3.9 is the first whose interpreter can")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]

    done = subprocess.run(
        [*command, "tests/interpreted_flashinfer.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout


def _choices(spec: GdnSpec = SPEC, device: Device = HOPPER) -> dict[str, Choice]:
    return {choice.kernel: choice for choice in explain(spec, device, backend="cuda")}


def _complete(site: Site) -> None:
    site.install_cutlass()
    site.install_flashinfer()


def _bare(site: Site) -> None:
    """Install nothing."""


def _without_cutlass(site: Site) -> None:
    site.install_flashinfer()


def _without_metadata(site: Site) -> None:
    site.install_cutlass()
    site.write("flashinfer/__init__.py")


def _too_old(site: Site) -> None:
    site.install_cutlass()
    site.install_flashinfer("0.6.13")


def _without_slots(site: Site) -> None:
    site.install_cutlass()
    site.install_flashinfer("0.6.18.post1")


def _half_installed(site: Site) -> None:
    _complete(site)
    (site.path / "flashinfer/gdn_prefill.py").unlink()


def _failing(site: Site) -> None:
    _complete(site)
    site.write("flashinfer/gdn_prefill.py", "raise RuntimeError('no driver\\nat all')")


def _broken(site: Site) -> None:
    _complete(site)
    site.write("flashinfer/__init__.py", "import tvm_ffi_that_is_not_here")


def _other_signature(site: Site) -> None:
    _complete(site)
    site.write("flashinfer/gdn_prefill.py", "def chunk_gated_delta_rule(q, k, v, g): ...")


def _without_scratch(site: Site) -> None:
    _complete(site)
    site.write("flashinfer/utils.py")


REASONS: dict[str, tuple[Callable[[Site], None], str]] = {
    "missing": (_bare, "flashinfer-python is not installed"),
    "without cutlass": (_without_cutlass, "nvidia-cutlass-dsl is not installed"),
    "without metadata": (_without_metadata, "module 'flashinfer' is not from flashinfer-python"),
    "too old": (_too_old, "flashinfer-python is 0.6.13, needs 0.7.0 or newer"),
    "too old for slots": (
        _without_slots,
        "flashinfer-python is 0.6.18.post1, needs 0.7.0 or newer",
    ),
    "half installed": (
        _half_installed,
        "flashinfer.gdn_prefill cannot be imported: ModuleNotFoundError: "
        "No module named 'flashinfer.gdn_prefill'",
    ),
    "failing": (_failing, "flashinfer.gdn_prefill cannot be imported: RuntimeError: no driver"),
    "broken": (
        _broken,
        "flashinfer.gdn_prefill cannot be imported: ModuleNotFoundError: "
        "No module named 'tvm_ffi_that_is_not_here'",
    ),
    "another signature": (
        _other_signature,
        "flashinfer.gdn_prefill:chunk_gated_delta_rule has no parameter beta, scale",
    ),
    "without scratch": (_without_scratch, "flashinfer.utils has no _get_cache_buf"),
}


@pytest.mark.parametrize(("install", "reason"), REASONS.values(), ids=REASONS)
def test_a_library_that_cannot_be_used_gives_its_reason_and_the_next_kernel_serves(
    site: Site, install: Callable[[Site], None], reason: str
) -> None:
    install(site)

    choices = _choices()

    assert choices[CHUNK].reasons[0].startswith(reason)
    assert choices["triton.chunk_prefill"].chosen
    assert bind(SPEC, HOPPER, backend="cuda").kernels[Op.CHUNK_PREFILL] == "triton.chunk_prefill"
    with pytest.raises(UnsupportedError, match="no kernel can serve chunk_prefill"):
        bind(SPEC, HOPPER, backend="cuda", kernels={Op.CHUNK_PREFILL: CHUNK})


def test_doctor_shows_why_a_library_cannot_be_used(site: Site, command: Command) -> None:
    _failing(site)

    document = command.document("doctor", "--arch", "sm90")

    choices = {choice["kernel"]: choice for choice in document["backends"]["cuda"]}
    assert choices[CHUNK]["reasons"][0].endswith("RuntimeError: no driver")
    assert choices["triton.chunk_prefill"]["chosen"]


def test_a_library_in_order_serves(site: Site) -> None:
    _complete(site)

    ops = bind(SPEC, HOPPER, backend="cuda")

    among = ops.kernels[Op.CHUNK_PREFILL].removeprefix("measured.chunk_prefill: ").split(" | ")
    assert {CHUNK, "triton.chunk_prefill"} <= set(among)
    assert ops.kernels[Op.RECURRENT_DECODE] == "triton.recurrent_decode"
    named = {Op.RECURRENT_DECODE: "flashinfer.recurrent_decode"}
    assert bind(SPEC, HOPPER, backend="cuda", kernels=named).kernels[Op.RECURRENT_DECODE] == (
        "flashinfer.recurrent_decode"
    )


def test_a_library_that_fails_is_imported_once(site: Site) -> None:
    _complete(site)
    count = "import pathlib\nwith pathlib.Path(__file__).with_name('count').open('a') as f:\n"
    site.write("flashinfer/gdn_prefill.py", f"{count}    f.write('x')\nraise OSError('no driver')")

    for _ in range(3):
        _choices()

    assert (site.path / "flashinfer/count").read_text() == "x"


def test_an_interrupt_during_the_import_is_none_of_its_errors(site: Site) -> None:
    _complete(site)
    site.write("flashinfer/gdn_prefill.py", "raise KeyboardInterrupt")

    with pytest.raises(KeyboardInterrupt):
        _choices()


def test_the_table_imports_no_library(site: Site) -> None:
    _complete(site)
    command = "import sys, gdn_backend_cuda; print(*sys.modules)"
    paths = os.pathsep.join(map(str, (site.path, ROOT, ROOT / "backends")))

    loaded = subprocess.run(
        [sys.executable, "-c", command],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()

    assert "gdn_backend_cuda" in loaded
    assert not {"flashinfer", "cutlass", "triton"} & set(loaded)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"state_layout": StateLayout.KV}, "state layout is KV, needs VK"),
        ({"head_v_dim": 64}, "head dims (K, V) is (128, 64), needs (128, 128)"),
        ({"dtype": torch.float32}, "dtype is torch.float32, needs torch.bfloat16"),
        ({"state_dtype": torch.float16}, "state dtype is torch.float16, needs torch.float32"),
    ],
    ids=["layout", "head dims", "dtype", "state dtype"],
)
def test_what_flashinfer_cannot_do_is_refused(
    site: Site, change: dict[str, object], reason: str
) -> None:
    _complete(site)

    choices = _choices(replace(SPEC, **change))

    for kernel in (kernel for kernel in BACKEND.kernels if kernel.name.startswith("flashinfer.")):
        assert any(found.startswith(reason) for found in choices[kernel.name].reasons)


def test_only_hopper_is_served_by_flashinfer(site: Site) -> None:
    _complete(site)

    choices = _choices(device=Device("cuda", "sm100"))

    assert choices[CHUNK].reasons == ("arch is sm100, needs sm90",)
    assert choices["triton.chunk_prefill"].chosen


@pytest.mark.parametrize("kernel", ["flashinfer.recurrent_decode", "flashinfer.mtp_verify"])
def test_padding_needs_a_slot_that_may_be_written(site: Site, kernel: str) -> None:
    _complete(site)

    choices = _choices(replace(SPEC, scratch_slot=None))

    assert choices[kernel].reasons == ("scratch_slot is None, needs a slot that padding may write",)
