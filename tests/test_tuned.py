# SPDX-License-Identifier: Apache-2.0
"""Files of measured times: what they hold, which serve, and what is said of damaged ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gdn_backend_cuda
import pytest
import torch

from gdn_portable import Device, GdnSpec, Op, TunedFileError, bind, select, tuned
from gdn_portable.bench.cases import LAYER
from gdn_portable.tuned import Cell, Layer, file_name, find, open_file, read, user_folder, versions
from tests.fakes import HOPPER, SPEC, install
from tests.tuned import BY_CELL, H200, ONE_LONG, A, B, backend_of_measured, keep

NAMES = frozenset(("a.chunk_prefill", "b.chunk_prefill"))
H100 = replace(H200, name="NVIDIA H100 80GB HBM3")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the times of this machine's user out, and return where a user's are."""
    monkeypatch.delenv(select.OVERRIDE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gdn_portable" / "tuned"


def _first(found: tuned.Found | None) -> float | None:
    """Return what tells files apart: the time of a in the first cell."""
    return None if found is None else found.times[ONE_LONG]["a.chunk_prefill"]


def _taking(time: float) -> dict[Cell, dict[str, float | None]]:
    return {**BY_CELL, ONE_LONG: {"a": time, "b": 20.0}}


def _find(shipped: Path, spec: GdnSpec = SPEC, device: Device = H200) -> tuned.Found | None:
    return find(spec, device, Op.CHUNK_PREFILL, NAMES, shipped)


def test_a_file_is_read_as_it_was_written_with_a_line_for_every_cell(tmp_path: Path) -> None:
    written = keep(tmp_path, by_cell={**BY_CELL, Cell(2, 64): {"a": None, "b": 1.5}})

    assert read(written.path) == replace(
        written, device=Device(H200.kind, H200.arch, name=H200.name)
    )
    lines = [line.strip() for line in written.path.read_text().splitlines()]
    assert '"2x64": { "a.chunk_prefill": null, "b.chunk_prefill": 1.5 },' in lines
    assert [path.name for path in tmp_path.iterdir()] == [written.path.name]


def test_a_file_is_named_after_the_gpu_and_the_versions() -> None:
    device = Device("cuda", "sm90", 0, "NVIDIA H100 80GB HBM3/x")

    name = file_name(device, {"flashinfer-python": "0.7.2.post1", "triton": "3.6.0+git1"})

    assert name == "nvidia-h100-80gb-hbm3-x_flashinfer-python-0.7.2.post1_triton-3.6.0+git1.json"


def test_a_file_that_is_not_there_is_empty_and_made_with_its_folder(tmp_path: Path) -> None:
    empty = open_file(tmp_path / "deep" / "folder", H200)

    empty.times(Layer.of(SPEC), Op.CHUNK_PREFILL)[Cell(1, 64)] = {"a": 1.0}
    empty.write()

    assert open_file(tmp_path / "deep" / "folder", H200).layers == empty.layers


def _other(**changes: Any) -> GdnSpec:
    return replace(SPEC, **changes)


MORE = {"num_k_heads": 4, "num_v_heads": 8}


@pytest.mark.parametrize(
    ("kept", "wanted"),
    [
        # each wins over the next
        ({"device": H200}, 1),
        ({"device": H200, "versions": {"triton": "1"}}, 1),
        ({"device": H200, "spec": _other(dtype=torch.float16)}, 1),
        ({"device": H200, "spec": _other(num_k_heads=4)}, 1),
        ({"device": H200, "spec": _other(**MORE)}, 1),
        ({"device": H200, "spec": _other(num_v_heads=16)}, 1),
        ({"device": H200, "spec": _other(qk_l2norm=False)}, 1),
        ({"device": H100}, 1),
    ],
    ids=["same", "versions", "dtype", "key heads", "heads", "value heads", "norms", "another GPU"],
)
def test_times_that_are_nearer_go_first(
    tmp_path: Path, kept: dict[str, Any], wanted: float
) -> None:
    ladder = [
        {"device": H200},
        {"device": H200, "versions": {"triton": "1"}},
        {"device": H200, "spec": _other(dtype=torch.float16)},
        {"device": H200, "spec": _other(num_k_heads=4)},
        {"device": H200, "spec": _other(**MORE)},
        {"device": H200, "spec": _other(num_v_heads=16)},
        {"device": H200, "spec": _other(qk_l2norm=False)},
        {"device": H100},
    ]
    for place, farther in enumerate(ladder[ladder.index(kept) + 1 :]):
        keep(tmp_path, by_cell=_taking(2.0), path=tmp_path / f"a{place}.json", **farther)
    keep(tmp_path, by_cell=_taking(wanted), path=tmp_path / "z.json", **kept)

    assert _first(_find(tmp_path)) == wanted


def test_the_users_times_go_before_those_that_are_shipped(tmp_path: Path, home: Path) -> None:
    keep(tmp_path, by_cell=_taking(1.0))
    keep(home, by_cell=_taking(2.0))

    assert user_folder() == home
    assert _first(_find(tmp_path)) == 2


def test_the_users_times_of_other_heads_leave_those_that_are_shipped(
    tmp_path: Path, home: Path
) -> None:
    keep(tmp_path, by_cell=_taking(1.0))
    keep(home, spec=_other(**MORE), by_cell=_taking(2.0))

    assert _first(_find(tmp_path)) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"device": Device("cuda", "sm100", 0, "NVIDIA H200")},
        {"device": Device("rocm", "sm90", 0, "NVIDIA H200")},
        {"spec": _other(head_v_dim=16)},
        {"ops": (Op.PREFILL_STEP,)},
        {"by_cell": {ONE_LONG: {"a": 1.0}}},
        {"by_cell": {ONE_LONG: {"a": 1.0, "b": None}}},
        {"by_cell": {**BY_CELL, Cell(2, 64): {}}},
        {"by_cell": {**BY_CELL, Cell(2, 64): {"a": 1.0, "c": 1.0}}},
        {"by_cell": {}},
    ],
    ids=[
        "arch", "vendor", "head dims", "op", "one kernel", "others failed", "not finished",
        "not all tried", "nothing",
    ],
)  # fmt: skip
def test_times_that_cannot_decide_are_not_used(tmp_path: Path, changes: dict[str, Any]) -> None:
    keep(tmp_path, **changes)

    assert _find(tmp_path) is None


def test_a_device_that_is_not_here_has_the_times_of_its_architecture(tmp_path: Path) -> None:
    keep(tmp_path)

    found = _find(tmp_path, device=HOPPER)

    assert found is not None and found.source(SPEC).startswith("times of NVIDIA H200")


def test_what_was_different_there_is_said(tmp_path: Path) -> None:
    there = {**versions(), "triton": "1.0", "amd-aiter": "2"}
    keep(tmp_path, spec=_other(**MORE), versions=there)

    found = _find(tmp_path)

    assert found is not None
    assert found.source(SPEC) == (
        "times of NVIDIA H200, for H=4 HV=8 bfloat16, with amd-aiter 2, here absent, with triton "
        f"1.0, here {versions()['triton']} ({found.tuned.path.name})"
    )


def _spoiled(spoil: Callable[[Any], object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        document = json.loads(path.read_text())
        spoil(document)
        path.write_text(json.dumps(document))

    return write


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: path.write_text("{"), "Expecting property name"),
        (lambda path: path.write_bytes(b"\xff"), "codec can't decode"),
        (lambda path: path.write_text("[]"), "the file is [], needs an object"),
        (_spoiled(lambda d: d.update(format=2)), "format is 2, needs 1"),
        (_spoiled(lambda d: d.pop("layers")), "layers is None, needs a list"),
        (_spoiled(lambda d: d["device"].pop("arch")), "arch is None, needs a text"),
        (_spoiled(lambda d: d.update(versions=3)), "versions is 3, needs an object"),
        (_spoiled(lambda d: d["layers"][0]["layer"].pop("dtype")), "layer has ['head_k_dim', "),
        (
            _spoiled(lambda d: d["layers"][0]["layer"].update(num_v_heads=0)),
            "needs positive numbers of heads and dims",
        ),
        (
            _spoiled(lambda d: d["layers"][0]["layer"].update(dtype="float17")),
            "needs the names of torch dtypes",
        ),
        (
            _spoiled(lambda d: d["layers"][0]["layer"].update(qk_l2norm="yes")),
            "needs true or false for qk_l2norm",
        ),
        (
            _spoiled(lambda d: d["layers"][0]["chunk_prefill"].update({"8 x 4": {}})),
            "cell is '8 x 4', needs sequences x length, as 8x1024",
        ),
        (
            _spoiled(lambda d: d["layers"][0]["chunk_prefill"]["1x8192"].update(c=-1.0)),
            "time of c at 1x8192 is -1.0, needs microseconds",
        ),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    write: Callable[[Path], None],
    reason: str,
) -> None:
    path = keep(tmp_path).path
    write(path)
    name = install(monkeypatch, backend_of_measured(tmp_path, A, B))

    with pytest.raises(TunedFileError) as caught:
        bind(SPEC, H200, backend=name)

    assert str(caught.value).startswith(f"{path} cannot be used: ")
    assert reason in str(caught.value)
    assert str(caught.value).endswith("; delete it, or have tune write it again")


def test_without_a_home_the_shipped_times_serve(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    keep(tmp_path)

    assert user_folder() is None
    assert _find(tmp_path) is not None


SHIPPED = sorted(Path(gdn_backend_cuda.__file__).parent.glob("tuned/*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=[path.name[:20] for path in SHIPPED])
def test_shipped_times_are_whole_and_of_kernels_that_there_are(path: Path) -> None:
    shipped = read(path)

    assert path.name == file_name(shipped.device, shipped.versions)
    for by_op in shipped.layers.values():
        for op, times in by_op.items():
            names = {kernel.name for kernel in gdn_backend_cuda.TABLE if kernel.op is op}
            assert {frozenset(cell) for cell in times.values()} == {frozenset(names)}
            assert all(time for cell in times.values() for time in cell.values())


def test_times_of_an_h200_are_shipped_for_both_ops() -> None:
    for op in (Op.CHUNK_PREFILL, Op.PREFILL_STEP):
        names = frozenset(k.name for k in gdn_backend_cuda.TABLE if k.op is op)
        found = find(LAYER, H200, op, names, gdn_backend_cuda.TUNED)

        assert found is not None and found.layer == Layer.of(LAYER)
