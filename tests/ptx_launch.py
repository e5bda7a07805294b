# SPDX-License-Identifier: Apache-2.0
"""Launches of Triton's kernels as they are compiled for Hopper, block after block on a CPU."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from gdn_backend_triton.launches import Launch
from torch import Tensor

from ci.resources.driver import compiling_for
from tests.cute_lanes import Space
from tests.ptx_block import WARP, Block
from tests.ptx_program import parse

SHARED = 1 << 16


class PtxLaunch(Launch):
    """Runs the PTX; a kernel may load what it need not wait for."""

    def __call__(
        self,
        programs: int,
        tensors: tuple[Tensor | None, ...],
        sizes: tuple[int, ...],
        numbers: tuple[Any, ...],
    ) -> None:
        """Launch it."""
        with compiling_for("sm90", lambda compiled: None):
            kernel = self._kernel[(programs,)](*tensors, *sizes, *numbers, **self._options)
        program = parse(kernel.asm["ptx"])
        values = (*tensors, *sizes, *numbers)
        given = [
            _word(value)
            for parameter, value in zip(self._kernel.params, values, strict=False)
            if not parameter.is_constexpr and value is not None
            # Triton compiles ones in
            if parameter.do_not_specialize or type(value) is not int or value != 1
        ]
        given += [0] * (len(program.parameters) - len(given))  # scratch memory, of which is none
        memory = Space.of([x for x in tensors if x is not None])
        threads = WARP * self._options["num_warps"]
        for index in range(programs):
            shared, rng = Space.shared(SHARED), random.Random(index)
            block = Block(
                program, given, memory, shared, threads, index, programs, rng, waits=False
            )
            block.run()


def _word(value: Tensor | float) -> int:
    if isinstance(value, Tensor):
        return value.data_ptr()
    return int(np.float32(value).view(np.uint32)) if isinstance(value, float) else value
