# SPDX-License-Identifier: Apache-2.0
"""Instructions of Hopper as functions of one thread's values; addresses are integers.

The tests have the same functions for the lanes of a block in NumPy, so that what is written with
them alone runs on both.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint32
from cutlass._mlir.dialects import arith, llvm
from cutlass.cutlass_dsl import dsl_user_op

PTX_NAMES = {"bfloat16": "bf16", "float16": "f16"}
CONSTRAINTS = {Float32: "f", Int32: "r", Uint32: "r", Int64: "l"}


@dsl_user_op
def _asm(text, results, operands, *, pure=False, memory=True, loc=None, ip=None):
    """Return what an instruction gives: its results are $0.., its operands follow.

    Args:
        pure: it may be moved, even into a branch.
        memory: it reads or writes memory, or waits.
    """
    constraints = ["=" + CONSTRAINTS[kind] for kind in results]
    constraints += [CONSTRAINTS[type(value)] for value in operands]
    if memory and not pure:
        constraints.append("~{memory}")
    types = [kind.mlir_type for kind in results]
    kind = None if not types else types[0]
    if len(types) > 1:
        kind = llvm.StructType.get_literal(types)
    given = llvm.inline_asm(
        kind, [value.ir_value(loc=loc, ip=ip) for value in operands], text, ",".join(constraints),
        has_side_effects=not pure, is_align_stack=False, asm_dialect=llvm.AsmDialect.AD_ATT,
        loc=loc, ip=ip,
    )  # fmt: skip
    if not types:
        return None
    if len(types) == 1:
        return results[0](given)
    return tuple(
        kind(llvm.extractvalue(kind.mlir_type, given, [n], loc=loc, ip=ip))
        for n, kind in enumerate(results)
    )


@dsl_user_op
def select(condition, yes, no, *, loc=None, ip=None):
    """Return ``yes`` or ``no`` without a branch."""
    kind = type(yes)
    chosen = arith.select(
        Boolean(condition).ir_value(loc=loc, ip=ip), yes.ir_value(loc=loc, ip=ip),
        no.ir_value(loc=loc, ip=ip), loc=loc, ip=ip,
    )  # fmt: skip
    return kind(chosen)


def _flag(condition):
    return select(condition, Int32(1), Int32(0))


def zero():
    """Return 0."""
    return Float32(0.0)


def one():
    """Return 1."""
    return Float32(1.0)


def no_bits():
    """Return a word of no bits."""
    return Uint32(0)


def shared_words(address, count):
    """Load 1, 2 or 4 words of 32 bits."""
    if count == 1:
        return (_asm("ld.shared.u32 $0, [$1];", [Uint32], [Int32(address)]),)
    names = ", ".join(f"${n}" for n in range(count))
    text = f"ld.shared.v{count}.u32 {{{names}}}, [${count}];"
    return _asm(text, [Uint32] * count, [Int32(address)])


def shared_u16(address):
    """Load 16 bits into a word."""
    return _asm("ld.shared.u16 $0, [$1];", [Uint32], [Int32(address)])


def shared_float(address):
    """Load a float."""
    return _asm("ld.shared.f32 $0, [$1];", [Float32], [Int32(address)])


def put_words(address, words):
    """Store 1, 2 or 4 words of 32 bits."""
    if len(words) == 1:
        _asm("st.shared.u32 [$0], $1;", [], [Int32(address), *words])
    elif len(words) == 2:
        _asm("st.shared.v2.u32 [$0], {$1, $2};", [], [Int32(address), *words])
    else:
        _asm("st.shared.v4.u32 [$0], {$1, $2, $3, $4};", [], [Int32(address), *words])


def put_u16(address, word):
    """Store the lower half of a word."""
    _asm("st.shared.u16 [$0], $1;", [], [Int32(address), word])


def put_float_if(condition, address, x):
    """Store a float, if so."""
    text = "{ .reg .pred p; setp.ne.s32 p, $0, 0; @p st.shared.f32 [$1], $2; }"
    _asm(text, [], [_flag(condition), Int32(address), x])


def global_u16(address):
    """Load 16 bits into a word."""
    return _asm("ld.global.u16 $0, [$1];", [Uint32], [Int64(address)])


def global_words(address):
    """Load two words of 32 bits."""
    return _asm("ld.global.v2.u32 {$0, $1}, [$2];", [Uint32] * 2, [Int64(address)])


def global_float(address):
    """Load a float."""
    return _asm("ld.global.f32 $0, [$1];", [Float32], [Int64(address)])


def store_u16_if(condition, address, word):
    """Store the lower half of a word, if so."""
    text = "{ .reg .pred p; setp.ne.s32 p, $0, 0; @p st.global.u16 [$1], $2; }"
    _asm(text, [], [_flag(condition), Int64(address), word])


def store_word_if(condition, address, word):
    """Store a word, if so."""
    text = "{ .reg .pred p; setp.ne.s32 p, $0, 0; @p st.global.u32 [$1], $2; }"
    _asm(text, [], [_flag(condition), Int64(address), word])


def store_words_if(condition, address, words):
    """Store 4 words, if so."""
    text = "{ .reg .pred p; setp.ne.s32 p, $0, 0; @p st.global.v4.u32 [$1], {$2, $3, $4, $5}; }"
    _asm(text, [], [_flag(condition), Int64(address), *words])


def store_float_if(condition, address, x):
    """Store a float, if so."""
    text = "{ .reg .pred p; setp.ne.s32 p, $0, 0; @p st.global.f32 [$1], $2; }"
    _asm(text, [], [_flag(condition), Int64(address), x])


def as_float(word):
    """Return the float that a word holds."""
    return _asm("mov.b32 $0, $1;", [Float32], [word], pure=True)


def as_word(x):
    """Return the word that holds a float."""
    return _asm("mov.b32 $0, $1;", [Uint32], [x], pure=True)


def low_bf16(word):
    """Return the lower half of a word as the float32 it is in bfloat16."""
    return as_float(word << Uint32(16))


def high_bf16(word):
    """Return the upper half of a word likewise."""
    return as_float(word & Uint32(0xFFFF0000))


def low_half(kind, word):
    """Return the lower half of a word as the float32 it is in bfloat16 or in float16."""
    if kind == "bfloat16":
        return low_bf16(word)
    text = "{ .reg .b16 a, b; mov.b32 {a, b}, $1; cvt.f32.f16 $0, a; }"
    return _asm(text, [Float32], [word], pure=True)


def high_half(kind, word):
    """Return the upper half of a word likewise."""
    if kind == "bfloat16":
        return high_bf16(word)
    text = "{ .reg .b16 a, b; mov.b32 {a, b}, $1; cvt.f32.f16 $0, b; }"
    return _asm(text, [Float32], [word], pure=True)


def pair(low, high):
    """Return two halves as one word; what is above 16 bits of ``low`` must be 0."""
    return low | (high << Uint32(16))


def round_halves(kind, low, high):
    """Return two floats rounded to bfloat16 or to float16, in one word."""
    text = f"cvt.rn.{PTX_NAMES[kind]}x2.f32 $0, $2, $1;"
    return _asm(text, [Uint32], [low, high], pure=True)


def upper_halves(low, high):
    """Return the upper halves of two floats in one word, and what is left of each."""
    text = "{ .reg .b32 a, b; mov.b32 a, $1; mov.b32 b, $2; prmt.b32 $0, a, b, 0x7632; }"
    word = _asm(text, [Uint32], [low, high], pure=True)
    return word, low - low_bf16(word), high - high_bf16(word)


def product16(a, b, c, kind="bfloat16"):
    """Return [16, 16] times [16, 8] plus c, one tensor core instruction."""
    name = PTX_NAMES[kind]
    text = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 {{$0, $1, $2, $3}}, "
        "{$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    return _asm(text, [Float32] * 4, [*a, *b, *c], memory=False)


def product8(a, b, c):
    """Return [16, 8] times [8, 8] plus c."""
    text = (
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, "
        "{$4, $5}, {$6}, {$7, $8, $9, $10};"
    )
    return _asm(text, [Float32] * 4, [*a, b, *c], memory=False)


def exp2(x):
    """Return 2 to the power of x, approximately."""
    return _asm("ex2.approx.f32 $0, $1;", [Float32], [x], pure=True)


def exp(x):
    """Return e to the power of x."""
    return cute.math.exp(x)


def log(x):
    """Return the natural logarithm."""
    return cute.math.log(x)


def reciprocal_root(x):
    """Return 1 / sqrt(x), approximately."""
    return _asm("rsqrt.approx.f32 $0, $1;", [Float32], [x], pure=True)


def add(x, y):
    """Add with rounding as written, whatever the compiler knows about sums."""
    return _asm("add.rn.f32 $0, $1, $2;", [Float32], [x, y], pure=True)


def number(x):
    """Return a constant as a float."""
    return Float32(x)


def wide(x):
    """Return an integer for arithmetic with addresses of global memory."""
    return Int64(x)


def shuffle(x, lane):
    """Return what another lane has."""
    text = "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;"
    return _asm(text, [type(x)], [x, Int32(lane)], memory=False)


def here(x):
    """Return x; what is computed of it is computed behind this, not where x is loaded."""
    return _asm("mov.b32 $0, $1;", [type(x)], [x], memory=False)


def sync_warp():
    """Wait for the other lanes; what they have written is seen."""
    _asm("bar.warp.sync 0xffffffff;", [], [])


def wait(barrier, phase):
    """Wait until a barrier in shared memory has gone through ``phase``."""
    text = (
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1;"
        " @!done bra again; }"
    )
    _asm(text, [], [Int32(barrier), Int32(phase)])


def arrive(barrier):
    """Arrive at a barrier."""
    _asm("mbarrier.arrive.shared::cta.b64 _, [$0];", [], [Int32(barrier)])


def create(barrier, count):
    """Make a barrier of ``count`` arrivals."""
    _asm("mbarrier.init.shared::cta.b64 [$0], $1;", [], [Int32(barrier), Int32(count)])


def fence_created():
    """Let bulk copies see the barriers that this thread has made."""
    _asm("fence.mbarrier_init.release.cluster;", [], [])
    fence_async()


def fence_async():
    """Order what this thread did to shared memory before bulk copies that follow."""
    _asm("fence.proxy.async.shared::cta;", [], [])


def fetch(target, source, size, barrier):
    """Copy ``size`` bytes from global to shared memory; the barrier counts them."""
    _asm(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", [], [Int32(barrier), Int32(size)]
    )
    _asm(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
        [], [Int32(target), Int64(source), Int32(size), Int32(barrier)],
    )  # fmt: skip


def put_back(target, source, size):
    """Copy ``size`` bytes from shared to global memory, as a group of its own."""
    _asm(
        "cp.async.bulk.global.shared::cta.bulk_group [$0], [$1], $2;", [],
        [Int64(target), Int32(source), Int32(size)],
    )  # fmt: skip
    _asm("cp.async.bulk.commit_group;", [], [])


def wait_read():
    """Wait until nothing that this thread puts back has yet to leave shared memory."""
    _asm("cp.async.bulk.wait_group.read 0;", [], [])


def global_word(address):
    """Load a signed word of global memory."""
    return _asm("ld.global.s32 $0, [$1];", [Int32], [Int64(address)])
