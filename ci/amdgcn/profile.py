# SPDX-License-Identifier: Apache-2.0
"""Counts what the ops execute and move at a model's shapes, and flash-linear-attention beside them.

    python -m ci.amdgcn.profile --arch gfx942

Counts are no times: see ``docs/performance.md``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import product
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from triton.runtime.autotuner import Autotuner
from triton.runtime.errors import OutOfResources

from ci.amdgcn.conformance import bind_simulated
from ci.amdgcn.driver import LDS_BYTES, Launch, simulated
from ci.amdgcn.errors import UnsupportedLaunchError
from ci.amdgcn.memory import Traffic
from gdn_portable import DraftProtocol, Op
from gdn_portable.bench import peers
from gdn_portable.bench.cases import DEFERRED, DRAFTS, LAYER, Case
from gdn_portable.bench.floors import work_of
from gdn_portable.bench.inputs import Batch, Slots
from gdn_portable.bench.ours import Call, prepare

CPU = torch.device("cpu")
BF16_STATE = replace(LAYER, state_dtype=torch.bfloat16)
CASES = (
    Case(op="decode_step", spec=LAYER, lengths=(1,) * 64),
    Case(op="decode_step", spec=BF16_STATE, lengths=(1,) * 64),
    Case(op="decode_step", spec=LAYER, lengths=(1,) * 64, deferred=DEFERRED),
    Case(
        op="verify_step",
        spec=LAYER,
        lengths=(DRAFTS,) * 64,
        protocol=DraftProtocol.REPLAY,
    ),
    Case(op="chunk_prefill", spec=LAYER, lengths=(2048,)),
    Case(op="chunk_prefill", spec=LAYER, lengths=(512,) * 4),
    # small enough for a test to repeat
    Case(op="chunk_prefill", spec=LAYER.shard(4), lengths=(256,) * 2),
    Case(op="prefill_step", spec=LAYER, lengths=(2048,)),
)

COLUMNS = (
    "case", "kernels", "instructions", "unique MB", "of ideal", "issued MB", "LDS MB",
    "MFMA GFLOP", "registers spilled",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Profile:
    """What one call did, all of its launches together.

    Attributes:
        case: what was called.
        name: of what served it.
        launches: kernels, in order. What torch does in between is not counted.
    """

    case: Case
    name: str
    launches: tuple[Launch, ...]

    @property
    def instructions(self) -> int:
        """Executed, once for every wave."""
        return sum(sum(launch.counts.instructions.values()) for launch in self.launches)

    @property
    def unique_bytes(self) -> int:
        """Bytes of global memory that a launch touches, once for each launch and direction."""
        return sum(t.unique_loaded + t.unique_stored for t in self._traffic())

    @property
    def issued_bytes(self) -> int:
        """Bytes that lanes load and store, every time."""
        return sum(t.loaded + t.stored for t in self._traffic())

    @property
    def lds_bytes(self) -> int:
        """Bytes that lanes load from shared memory and store there."""
        return sum(x.counts.lds_loaded + x.counts.lds_stored for x in self.launches)

    @property
    def mfma_flops(self) -> int:
        """Executed by matrix instructions, what a mask discards included."""
        return sum(launch.counts.mfma_flops for launch in self.launches)

    @property
    def spills(self) -> int:
        """Vector registers that kernels spill."""
        return sum(launch.resources["vgpr_spill_count"] for launch in self.launches)

    def _traffic(self) -> Iterator[Traffic]:
        for launch in self.launches:
            yield from launch.traffic.values()


def profile(case: Case, arch: str) -> Profile:
    """Return what this library does in a case."""
    ops = bind_simulated(case.spec, arch)
    return _run(case, arch, ops.kernels[Op(case.op)], partial(prepare, ops))


def profile_peers(case: Case, arch: str) -> Iterator[Profile]:
    """Yield what each peer does that is installed and consists of Triton kernels alone.

    Kernels that would be autotuned take the first of their configurations that fits.
    """
    # a library looks for its device when it is imported
    with simulated(arch):
        found = [peer for peer in peers.peers(case) if peer.refusal is None]
    for peer in found:
        with _first_fitting_configuration():
            yield _run(case, arch, peer.name, peer.prepare)


def _run(case: Case, arch: str, name: str, prepare_call: Callable[[Batch], Call]) -> Profile:
    generator = torch.Generator().manual_seed(0)
    batch = Batch(case, Slots(case, CPU, generator), CPU, seed=0)
    batch.refresh()
    with torch.no_grad(), simulated(arch) as gpu:
        call = prepare_call(batch)
        gpu.launches.clear()
        call()
    return Profile(case, name, tuple(gpu.launches))


@contextmanager
def _first_fitting_configuration() -> Iterator[None]:
    """Make Triton's autotuner try configurations in order, until one can be launched."""
    former = Autotuner.run

    def run(tuner: Any, *args: Any, **kwargs: Any) -> Any:
        while len(tuner.configs) > 1:
            every, tuner.configs = tuner.configs, tuner.configs[:1]
            try:
                return former(tuner, *args, **kwargs)
            except (OutOfResources, UnsupportedLaunchError):
                tuner.configs = every[1:]
        return former(tuner, *args, **kwargs)

    Autotuner.run = run
    try:
        yield
    finally:
        Autotuner.run = former


def main(
    arch: Annotated[list[str] | None, typer.Option(help="gfx942 or gfx950; both.")] = None,
    case: Annotated[list[str] | None, typer.Option(help="Pattern of the cases' names.")] = None,
    launches: Annotated[bool, typer.Option("--launches", help="Show every launch.")] = False,
) -> None:
    """Count what the ops and their peers execute and move; a table for every GPU."""
    chosen = [c for c in CASES if not case or any(fnmatchcase(c.name, x) for x in case)]
    if not chosen:
        names = ", ".join(c.name for c in CASES)
        raise typer.BadParameter(f"no case matches {case}; there is {names}")
    torch.set_num_threads(1)
    todo = [*product(arch or LDS_BYTES, chosen)]
    rows: dict[str, list[str]] = defaultdict(list)
    for gpu, one in track(todo, "cases", console=Console(stderr=True)):
        for found in (profile(one, gpu), *profile_peers(one, gpu)):
            rows[gpu] += _rows(found, each=launches)
    for gpu, lines in rows.items():
        print(f"\n{gpu}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        print("\n".join(lines))


def _rows(found: Profile, *, each: bool) -> Iterator[str]:
    ideal = work_of(found.case).bytes
    yield _row(found, found.case.name, found.name, ideal)
    if each:
        for launch in found.launches:
            part = replace(found, launches=(launch,))
            yield _row(part, "", f"{launch.kernel}, {launch.grid[0]} programs", ideal)


def _row(found: Profile, case: str, name: str, ideal: int) -> str:
    cells = (
        case,
        name,
        f"{found.instructions / 1e6:.2f} M",
        f"{found.unique_bytes / 1e6:.1f}",
        f"{found.unique_bytes / ideal:.3f}",
        f"{found.issued_bytes / 1e6:.1f}",
        f"{found.lds_bytes / 1e6:.1f}",
        f"{found.mfma_flops / 1e9:.2f}",
        str(found.spills),
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    typer.run(main)
