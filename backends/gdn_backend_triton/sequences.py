# SPDX-License-Identifier: Apache-2.0
"""Which tokens a program owns, found on the device from ``cu_seqlens`` alone.

A packed batch of N sequences is cut into blocks of BLOCK tokens. Sequence n has the programs from
``n + cu_seqlens[n] // BLOCK`` on: at least one, also where it is empty, and enough for its tokens.
The rows at or past ``cu_seqlens[N]`` are sequence N. So the grid depends on shapes only, and no
length is ever read on the host.
"""

import triton
import triton.language as tl


def num_programs(num_tokens: int, num_sequences: int, block: int) -> int:
    """Return how many programs cover ``num_tokens`` rows of ``num_sequences`` sequences."""
    return num_sequences + 1 + num_tokens // block


@triton.jit
def locate(cu_seqlens, stride, N, T, program, BLOCK):
    """Find a program's place.

    Returns:
        Its sequence, N for the rows of nobody; that sequence's first row and the row after its
        last; and the program's own first row, at or past that end where it has nothing to do.
    """
    low = 0
    high = N + 1
    # loads in a row take longest: each narrows the search to a 32nd
    lane = tl.arange(0, 32)
    while high - low > 1:
        step = (high - low + 31) // 32
        probe = low + lane * step
        inside = probe < high
        start = tl.load(cu_seqlens + probe * stride, mask=inside, other=0).to(tl.int32)
        found = inside & ((lane == 0) | (probe + start // BLOCK <= program))
        low += (tl.sum(found.to(tl.int32)) - 1) * step
        high = tl.minimum(low + step, high)
    start = tl.load(cu_seqlens + low * stride).to(tl.int32)
    end = T
    if low < N:
        end = tl.load(cu_seqlens + (low + 1) * stride).to(tl.int32)
    first = start + (program - low - start // BLOCK) * BLOCK
    return low, start, end, first


@triton.jit
def sequence_of(cu_seqlens, stride, N, token):
    """Return the sequence of each token, N for the rows of nobody."""
    n = tl.zeros_like(token)
    left = N + 1
    while left > 1:
        half = left // 2
        start = tl.load(cu_seqlens + (n + half) * stride).to(tl.int32)
        n = tl.where(start <= token, n + half, n)
        left -= half
    return n
