# SPDX-License-Identifier: Apache-2.0
"""Libraries behind the kernels for NVIDIA as they may be installed, without what they do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from gdn_backend_cuda import cute_probe, flashinfer_probe

# modules and distributions that a site has or has not, whatever is installed here
MODULES = ("flashinfer", "cutlass", "cuda")
DISTRIBUTIONS = ("flashinfer-python", "nvidia-cutlass-dsl")
FUNCTIONS = {
    "flashinfer/gdn_decode.py": ("gated_delta_rule_decode_pretranspose", "gated_delta_rule_mtp"),
    "flashinfer/gdn_prefill.py": ("chunk_gated_delta_rule",),
    "flashinfer/utils.py": ("_get_cache_buf",),
    "flashinfer/gdn_kernels/gdn_decode_bf16_state.py": ("gated_delta_rule_mtp",),
}


class Site:
    """A folder that packages are installed into."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, text: str = "") -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def describe(self, name: str, version: str) -> None:
        folder = f"{name.replace('-', '_')}-{version}.dist-info"
        self.write(f"{folder}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}")

    def install_cutlass(self, version: str = "4.8.1") -> None:
        """Install its name: FlashInfer's adapters import no more of it."""
        self.write("cutlass/__init__.py")
        self.describe("nvidia-cutlass-dsl", version)

    def install_cute(self, version: str = "4.8.1") -> None:
        """Install all that our kernels are written in."""
        self.install_cutlass(version)
        for package in ("cutlass/_mlir", "cutlass/_mlir/dialects", "cuda", "cuda/bindings"):
            self.write(f"{package}/__init__.py")
        for module, names in cute_probe.NAMES.items():
            file = "/__init__.py" if module in ("cutlass", "cutlass.cute") else ".py"
            text = "\n".join(f"{name} = object()" for name in names)
            self.write(module.replace(".", "/") + file, text)

    def install_flashinfer(self, version: str = "0.7.2.post1") -> None:
        self.write("flashinfer/__init__.py")
        self.write("flashinfer/gdn_kernels/__init__.py")
        for file, functions in FUNCTIONS.items():
            module = file.removesuffix(".py").replace("/", ".")
            signatures = (
                f"def {name}({', '.join(flashinfer_probe.SEMANTIC[f'{module}:{name}'])}): ..."
                for name in functions
            )
            self.write(file, "\n".join(signatures))
        self.describe("flashinfer-python", version)


def installed(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Yield the one site that has these packages; whatever is imported from it is forgotten."""
    find_spec, version = importlib.util.find_spec, importlib.metadata.version
    probes = (flashinfer_probe._unusable, cute_probe._unusable)

    def find_here(name: str, package: str | None = None) -> ModuleSpec | None:
        hidden = name in MODULES and not (path / name).exists()
        return None if hidden else find_spec(name, package)

    def version_here(name: str) -> str:
        if name not in DISTRIBUTIONS:
            return version(name)
        for found in importlib.metadata.distributions(name=name, path=[str(path)]):
            return found.version
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_here)
    monkeypatch.setattr(importlib.metadata, "version", version_here)
    monkeypatch.syspath_prepend(str(path))
    for name in _loaded():
        monkeypatch.delitem(sys.modules, name)
    for probe in probes:
        probe.cache_clear()
    yield Site(path)
    for probe in probes:
        probe.cache_clear()
    for name in _loaded():
        del sys.modules[name]


def _loaded() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] in MODULES]
