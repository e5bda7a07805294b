# SPDX-License-Identifier: Apache-2.0
"""Kernels that start before the one in front of them has ended, from Hopper on.

It takes half a microsecond off an op, whoever launched the kernel in front. An op's first kernel
waits at its top for all that was launched before it, and lets the next one start then: so that one
finds all done but what the first computes, and may load states while it runs. No program of any of
them ends without having waited, or what is launched behind could start too soon.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def begin(OVERLAPS: tl.constexpr):
    """Wait for all that was launched before, then let the kernel behind this one start."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
