"""The emulator itself: number formats, integer instructions, control flow, and litmus tests of the memory model."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.support.ptxemu import formats, integers
from tests.support.ptxemu.errors import (
    BarrierError,
    DeadlockError,
    EmulatorError,
    MisalignedError,
    OutOfBoundsError,
    RaceError,
    UnsupportedError,
)
from tests.support.ptxemu.lower import Program
from tests.support.ptxemu.memory import Memory
from tests.support.ptxemu.parse import parse
from tests.support.ptxemu.schedule import POLICIES, Grid, Schedule, Settings, run_in_batches
from tests.support.ptxemu.storage import Storage

pytestmark = pytest.mark.ptx

# Formats and integers


def float32_bits(count: int = 200_000) -> np.ndarray:
    """Return random bits, and those around every value of the small formats."""
    rng = np.random.default_rng(1)
    halves = np.arange(1 << 16, dtype=np.uint32)
    near = [(halves << np.uint32(16)) + np.uint32(delta % (1 << 32)) for delta in (-1, 0, 1, 0x8000, 0x7FFF, 0x8001)]
    of_f16 = (
        torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).float().numpy().view(np.uint32)
    )
    near += [of_f16 + np.uint32(delta % (1 << 32)) for delta in (-1, 0, 1, 0x1000, 0xFFF, 0x1001)]
    return np.concatenate([rng.integers(0, 1 << 32, count, dtype=np.uint32), *near])


def test_narrowing_equals_torch() -> None:
    """E4M3 after a clamp, bf16 and float16 equal torch's casts; NaN is canonical."""
    bits = float32_bits()
    values = torch.from_numpy(bits.view(np.float32))
    nan = values.isnan().numpy()
    e4m3 = values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert (formats.to_e4m3(bits) == np.where(nan, 0x7F, e4m3)).all()
    for convert, dtype in ((formats.to_bf16, torch.bfloat16), (formats.to_f16, torch.float16)):
        wanted = values.to(dtype).view(torch.int16).numpy().view(np.uint16)
        assert (convert(bits) == np.where(nan, 0x7FFF, wanted)).all()


def test_widening_equals_torch() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16)
    for convert, dtype in ((formats.from_f16, torch.float16), (formats.from_bf16, torch.bfloat16)):
        wide = torch.from_numpy(halves.view(np.int16)).view(dtype).float()
        wanted = np.where(wide.isnan().numpy(), formats.NAN32, wide.numpy().view(np.uint32))
        assert (convert(halves) == wanted).all()
    codes = np.arange(256, dtype=np.uint8)
    wide = torch.from_numpy(codes).view(torch.float8_e4m3fn).half()
    assert (
        formats.e4m3_to_f16(codes) == np.where(wide.isnan(), 0x7FFF, wide.view(torch.int16).numpy().view(np.uint16))
    ).all()


def rounded(value: Fraction) -> np.float32:
    """Return the nearest float32, ties to even, for values of the normal range."""
    power = 0
    while abs(value) >= 1 << 24:
        value, power = value / 2, power + 1
    while 0 < abs(value) < 1 << 23:
        value, power = value * 2, power - 1
    return np.ldexp(np.float32(round(value)), power)


def test_fma_rounds_once() -> None:
    """Random operands with products near the addend equal exact rational arithmetic."""
    rng = random.Random(2)
    for _ in range(3000):
        a, b = (np.float32(rng.uniform(0.5, 2) * rng.choice((-1, 1))) for _ in range(2))
        c = np.float32(
            -float(a) * float(b) * (1 + rng.choice((0, 1e-7, 1e-3, 1, -3))) * rng.choice((1, 2.0**-24, 2.0**24))
        )
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        found = formats.fma(*(np.array([value]).view(np.uint32) for value in (a, b, c))).view(np.float32)[0]
        assert found == rounded(exact)


def test_integer_instructions() -> None:
    rng = np.random.default_rng(3)
    a, b, c = (rng.integers(0, 1 << 32, 500, dtype=np.uint32) for _ in range(3))
    for x, y, z, found in zip(a.tolist(), b.tolist(), c.tolist(), integers.prmt(a, b, c).tolist(), strict=True):
        joined = (x | y << 32).to_bytes(8, "little")
        picked = [(joined[z >> 4 * i & 7], z >> 4 * i & 8) for i in range(4)]
        assert found == int.from_bytes(bytes((0xFF if v & 0x80 else 0) if sign else v for v, sign in picked), "little")
    amounts = np.arange(40, dtype=np.uint32)
    for value in (0x80000001, 0x7FFFFFFF, 5):
        word = np.full(40, value, np.uint32)
        assert integers.shl(word, amounts, 32).tolist() == [value << i & 0xFFFFFFFF for i in range(40)]
        assert integers.shr(word, amounts, 32).tolist() == [value >> i for i in range(40)]
        signed = value - (1 << 32 if value >> 31 else 0)
        assert integers.shr(word.view(np.int32), amounts, 32).tolist() == [signed >> i for i in range(40)]
    long = rng.integers(0, 1 << 64, 100, dtype=np.uint64)
    products = integers.mul_high(long, long[::-1], False).tolist()
    assert products == [x * y >> 64 for x, y in zip(long.tolist(), long[::-1].tolist(), strict=True)]
    assert integers.div(np.array([-7, 7, 5], np.int64), np.array([2, -2, 0], np.int64)).tolist() == [-3, -3, -1]
    assert integers.rem(np.array([-7, 7], np.int32), np.array([2, -2], np.int32)).tolist() == [-1, 1]
    one = np.uint64(1 << 63), np.uint64(6)
    assert (int(integers.mul_high(*one, False)), int(integers.mul_high(*one, True))) == (3, (1 << 64) - 3)
    assert int(integers.div(np.int64(-(1 << 40)), np.int64(3))) == -((1 << 40) // 3)
    assert int(integers.shr(np.int32(-8), np.uint32(1), 32)) == -4
    assert int(integers.prmt(np.uint32(0x44332211), np.uint32(0), np.uint32(0x0123))) == 0x11223344
    assert integers.popc(a).tolist() == [x.bit_count() for x in a.tolist()]
    edges = np.array([0, 1, 2, 0xFFFFFFFF, 0x7FFFFFFF, 0x1000000, 0xFFFFFF], np.uint32)
    assert integers.clz(edges).tolist() == [32 - x.bit_length() for x in edges.tolist()]


def test_float_comparisons_and_extremes() -> None:
    values = np.array([-np.inf, -1, -0.0, 0.0, 1, np.inf, np.nan], np.float32)
    a, b = (side.ravel() for side in np.meshgrid(values, values))
    pair = a.view(np.uint32), b.view(np.uint32)
    nan = np.isnan(a) | np.isnan(b)
    assert (integers.compare(*pair, "lt") == (a < b)).all()
    assert (integers.compare(*pair, "ltu") == ((a < b) | nan)).all()
    assert (integers.compare(*pair, "nan") == nan).all()
    found = integers.extreme(*pair, "max", False)
    assert (found[~nan].view(np.float32) == np.maximum(a, b)[~nan]).all()
    assert (found[np.isnan(a) & ~np.isnan(b)] == pair[1][np.isnan(a) & ~np.isnan(b)]).all()
    assert (integers.extreme(*pair, "max", True)[nan] == formats.NAN32).all()
    zeros = np.array([0x80000000], np.uint32), np.array([0], np.uint32)
    assert int(integers.extreme(*zeros, "max", False)[0]) == 0
    assert int(integers.extreme(*zeros, "min", False)[0]) == 0x80000000


# Hand-written PTX

HEAD = """
.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry k(.param .u64 data) .reqntid {threads}
{{
.reg .pred %p<8>; .reg .b16 %h<4>; .reg .b32 %r<20>; .reg .b64 %rd<8>;
ld.param.u64 %rd0, [data];
mov.u32 %r0, %tid.x;
mov.u32 %r1, %ctaid.x;
"""


def program(body: str, threads: int = 32) -> Program:
    """Return a kernel: %rd0 is the address of its data, %r0 the thread, %r1 the CTA."""
    return Program(parse(HEAD.format(threads=threads) + body + "\nret;\n}\n"))


def launch(
    body: str | list[str],
    ctas: int = 1,
    words: int = 64,
    threads: int = 32,
    settings: Settings | None = None,
    readable: int = 0,
) -> tuple[np.ndarray, Memory]:
    """Run a kernel, or a list of dependent ones, on zeros; ``readable``: words that may not be stored to."""
    whole = np.zeros(words * 4 + 64, np.uint8)
    start = -whole.ctypes.data % 16
    data = whole[start : start + words * 4]
    memory = Memory()
    storage = Storage(data.ctypes.data, data, "data")
    storage.allow(0, 1, data.nbytes, data.nbytes - 4 * readable, writable=True)
    storage.allow(0, 1, data.nbytes, data.nbytes, writable=False)
    memory.add(storage)
    bodies = [body] if isinstance(body, str) else body
    address = np.uint64(data.ctypes.data)
    grids = [Grid(program(text, threads), ctas, {"data": address}, 1024, memory) for text in bodies]
    if settings is None:
        run_in_batches(grids[0], 8192)
    else:
        Schedule(grids, settings, settings.seed).run()
    return data.view(np.uint32), memory


def schedules(count: int = 40, resident: int = 4) -> list[Settings]:
    return [
        Settings(resident=resident, policy=policy, per_warp=per_warp, seed=seed)
        for seed, policy, per_warp in itertools.islice(
            ((seed, policy, per_warp) for seed in range(99) for policy in POLICIES for per_warp in (False, True)), count
        )
    ]


def any_raises(body: str | list[str], kind: type[EmulatorError], **options: int) -> bool:
    """Return True if some schedule reports this error; another error fails the test."""
    for settings in schedules():
        try:
            launch(body, settings=settings, **options)  # type: ignore[arg-type]  # numbers by name
        except kind:
            return True
    return False


def test_divergent_branches_and_loops_meet_again() -> None:
    """Each lane counts its own Collatz steps, and the lanes are together again at a shuffle."""
    body = """
    add.u32 %r2, %r0, 1; mov.u32 %r3, 0;
    $loop: setp.eq.u32 %p0, %r2, 1; @%p0 bra $end;
    and.b32 %r4, %r2, 1; setp.eq.u32 %p1, %r4, 0; @%p1 bra $even;
    mad.lo.u32 %r2, %r2, 3, 1; bra.uni $next;
    $even: shr.u32 %r2, %r2, 1;
    $next: add.u32 %r3, %r3, 1; bra.uni $loop;
    $end: shfl.sync.bfly.b32 %r5, %r3, 1, 31, -1;
    mad.lo.u32 %r6, %r5, 1000, %r3;
    mul.wide.u32 %rd1, %r0, 4; add.s64 %rd1, %rd1, %rd0; st.global.b32 [%rd1], %r6;
    """

    def steps(value: int) -> int:
        return 0 if value == 1 else 1 + steps(value // 2 if value % 2 == 0 else 3 * value + 1)

    found, _ = launch(body)
    assert found[:32].tolist() == [1000 * steps((lane ^ 1) + 1) + steps(lane + 1) for lane in range(32)]


def test_shuffles_and_reductions() -> None:
    """All modes: segments of 8 lanes for ``up`` and ``down``, and a source lane of each lane for ``idx``."""
    body = """
    mul.lo.u32 %r2, %r0, 7;
    shfl.sync.up.b32 %r3, %r2, 2, 0x1800, -1; shfl.sync.down.b32 %r4, %r2, 3, 0x181f, -1;
    shfl.sync.idx.b32 %r5, %r2, 5, 31, -1; sub.u32 %r6, %r2, 100; redux.sync.max.s32 %r7, %r6, -1;
    redux.sync.max.u32 %r8, %r6, -1; redux.sync.add.s32 %r9, %r2, -1;
    mul.lo.u32 %r10, %r0, 5; shfl.sync.idx.b32 %r11, %r2, %r10, 31, -1;
    mul.wide.u32 %rd1, %r0, 32; add.s64 %rd1, %rd1, %rd0; st.global.b32 [%rd1+24], %r11;
    st.global.b32 [%rd1], %r3; st.global.b32 [%rd1+4], %r4; st.global.b32 [%rd1+8], %r5; st.global.b32 [%rd1+12], %r7;
    st.global.b32 [%rd1+16], %r8; st.global.b32 [%rd1+20], %r9;
    """
    found = launch(body, words=256)[0].reshape(32, 8)
    for lane in range(32):
        up = 7 * (lane - 2 if lane % 8 >= 2 else lane)
        down = 7 * (lane + 3 if lane % 8 < 5 else lane)
        assert found[lane, :7].tolist() == [up, down, 35, 117, (1 << 32) - 2, 7 * 496, 7 * (lane * 5 % 32)]


def test_maxima_above_zero() -> None:
    """``max.relu``, of one integer and of two halves: against zero, too."""
    body = """
    sub.u32 %r2, %r0, 20; sub.u32 %r3, %r0, 28; max.relu.s32 %r4, %r2, %r3;
    shl.b32 %r5, %r2, 16; and.b32 %r6, %r0, 65535; or.b32 %r5, %r5, %r6; max.relu.s16x2 %r7, %r5, %r5;
    mul.wide.u32 %rd1, %r0, 8; add.s64 %rd1, %rd1, %rd0; st.global.v2.b32 [%rd1], {%r4, %r7};
    """
    found = launch(body)[0].reshape(32, 2)
    assert found.tolist() == [[max(lane - 20, 0), (max(lane - 20, 0) << 16) + lane] for lane in range(32)]


AT_THREAD = "mad.lo.u32 %r2, %r1, 32, %r0; mul.wide.u32 %rd1, %r2, 4; add.s64 %rd1, %rd1, %rd0;"


@pytest.mark.parametrize(
    ("kind", "body", "options"),
    [
        (OutOfBoundsError, AT_THREAD + "ld.global.b32 %r3, [%rd1+4];", {"words": 32}),
        (OutOfBoundsError, AT_THREAD + "st.global.b32 [%rd1+-4], %r0;", {}),
        (OutOfBoundsError, AT_THREAD + "st.global.b32 [%rd1], %r0;", {"readable": 40}),
        (OutOfBoundsError, "ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd0+240]; ld.global.b32 %r3, [%rd0+256];", {}),
        (MisalignedError, AT_THREAD + "ld.global.v2.b32 {%r3, %r4}, [%rd1];", {}),
        (MisalignedError, "ld.global.b16 %h0, [%rd0+1];", {}),
        (RaceError, "st.global.b32 [%rd0], %r0;", {}),
        (RaceError, "st.global.b32 [%rd0], %r1;", {"ctas": 2}),
        (RaceError, "mul.lo.u32 %r3, %r0, 4; mov.u32 %r5, smem; add.u32 %r3, %r3, %r5; st.shared.b32 [%r3], %r0;"
         "xor.b32 %r3, %r3, 4; ld.shared.b32 %r4, [%r3];", {}),
        (RaceError, "mov.u32 %r5, smem; ld.shared.b32 %r4, [%r5];", {}),
        (OutOfBoundsError, "mov.u32 %r5, smem; ld.shared.b32 %r4, [%r5+1024];", {}),
        (BarrierError, "setp.lt.u32 %p0, %r0, 16; @%p0 bra $skip; bar.sync 0; $skip: mov.u32 %r2, 0;", {}),
        (BarrierError, "setp.lt.u32 %p0, %r0, 32; @%p0 ret; bar.sync 0;",
         {"threads": 64, "settings": Settings(per_warp=True)}),
        (UnsupportedError, "sin.approx.f32 %r2, %r0;", {}),
        (UnsupportedError, "ld.global.nc.b32 %r2, [%rd0];", {}),
        (UnsupportedError, "div.full.f32 %r2, %r0, %r0;", {}),
        (DeadlockError, "$spin: ld.acquire.gpu.global.b32 %r2, [%rd0]; setp.eq.u32 %p0, %r2, 0; @%p0 bra $spin;",
         {"settings": Settings()}),
    ],
)  # fmt: skip
def test_errors_are_reported(kind: type[EmulatorError], body: str, options: dict[str, object]) -> None:
    with pytest.raises(kind):
        launch(body, **options)  # type: ignore[arg-type]  # numbers and settings by name


def test_equal_bytes_stored_twice_are_noted() -> None:
    assert launch("mov.u32 %r2, 7; st.global.b32 [%rd0], %r2;", ctas=3)[1].equal
    assert launch("mov.u32 %r2, 7; st.global.b32 [%rd0], %r2;", ctas=3, settings=Settings())[1].equal
    assert not launch(AT_THREAD + "st.global.b32 [%rd1], %r2;", ctas=2)[1].equal


PASS_MESSAGE = """
setp.ne.u32 %p0, %r0, 0; @%p0 ret;
setp.ne.u32 %p0, %r1, 0; @%p0 bra $reader;
mov.u32 %r2, 42; st.global.b32 [%rd0], %r2; {fence}
mov.u32 %r3, 1; {store} [%rd0+64], %r3; ret;
$reader: {load} %r4, [%rd0+64]; setp.eq.u32 %p1, %r4, 0; @%p1 bra $reader;
{reader_fence} ld.global.b32 %r5, [%rd0]; st.global.b32 [%rd0+128], %r5;
"""
RELEASE, RELAXED_STORE = "st.release.gpu.global.b32", "st.relaxed.gpu.global.b32"
ACQUIRE, RELAXED_LOAD = "ld.acquire.gpu.global.b32", "ld.relaxed.gpu.global.b32"
FENCE = "fence.acq_rel.gpu;"


@pytest.mark.parametrize(
    ("store", "load", "fence", "reader_fence", "ordered"),
    [
        (RELEASE, ACQUIRE, "", "", True),
        (RELAXED_STORE, ACQUIRE, FENCE, "", True),
        (RELEASE, RELAXED_LOAD, "", FENCE, True),
        (RELAXED_STORE, RELAXED_LOAD, FENCE, FENCE, True),
        ("atom.exch.release.gpu.global.b32 %r9,", ACQUIRE, "", "", True),
        (RELAXED_STORE, ACQUIRE, "", "", False),
        (RELEASE, RELAXED_LOAD, "", "", False),
        (RELEASE, "ld.volatile.global.b32", "", "", False),
        (RELEASE, "ld.global.b32", "", "", False),
        ("st.global.b32", ACQUIRE, "", "", False),
        (RELEASE, ACQUIRE.replace("gpu", "cta"), "", "", False),
        (RELEASE.replace("gpu", "cta"), ACQUIRE, "", "", False),
        (RELAXED_STORE, ACQUIRE, "fence.acq_rel.cta;", "", False),
    ],
)
def test_message_passing(store: str, load: str, fence: str, reader_fence: str, ordered: bool) -> None:
    """A message arrives in every schedule, or a race is found in every schedule that reads it."""
    body = PASS_MESSAGE.format(store=store, load=load, fence=fence, reader_fence=reader_fence)
    if not ordered:
        assert any_raises(body, RaceError, ctas=2)
        return
    for settings in schedules(28):
        assert int(launch(body, ctas=2, settings=settings)[0][32]) == 42


def test_a_barrier_extends_acquire_and_release_to_the_cta() -> None:
    """Another thread than the one that acquires may read, after bar.sync only."""
    body = """
    setp.ne.u32 %p0, %r1, 0; @%p0 bra $reader;
    setp.eq.u32 %p2, %r0, 33; mov.u32 %r2, 42; @%p2 st.global.b32 [%rd0], %r2; {barrier}
    setp.eq.u32 %p3, %r0, 0; mov.u32 %r3, 1; @%p3 st.release.gpu.global.b32 [%rd0+64], %r3; ret;
    $reader: mov.u32 %r4, 1; setp.ne.u32 %p4, %r0, 0; @%p4 bra $read;
    $poll: ld.acquire.gpu.global.b32 %r4, [%rd0+64]; setp.eq.u32 %p1, %r4, 0; @%p1 bra $poll;
    $read: bar.sync 0; setp.eq.u32 %p5, %r0, 40; @%p5 ld.global.b32 %r5, [%rd0]; @%p5 st.global.b32 [%rd0+128], %r5;
    """
    for settings in schedules(28):
        found, _ = launch(body.format(barrier="bar.sync 0;"), ctas=2, threads=64, settings=settings)
        assert int(found[32]) == 42
    assert any_raises(body.format(barrier=""), RaceError, ctas=2, threads=64)
    assert any_raises(
        body.format(barrier="bar.sync 0;").replace("$read: bar.sync 0;", "$read:"), RaceError, ctas=2, threads=64
    )


def test_atomics_lose_nothing_and_races_are_found() -> None:
    """Increments by atomics add up in every schedule; loads and stores in their place are a race."""
    atomic = (
        "mov.u32 %r2, 3; {} mov.u32 %r3, 0; $next: red.relaxed.gpu.global.add.u32 [%rd0], %r2; add.u32 %r3, %r3, 1;"
    )
    atomic = atomic.format("") + "setp.lt.u32 %p0, %r3, 4; @%p0 bra $next;"
    for settings in schedules(28):
        assert int(launch(atomic, ctas=3, settings=settings)[0][0]) == 3 * 4 * 3 * 32
    plain = (
        "setp.ne.u32 %p0, %r0, 0; @%p0 ret; ld.global.b32 %r2, [%rd0]; add.u32 %r2, %r2, 1; st.global.b32 [%rd0], %r2;"
    )
    assert any_raises(plain, RaceError, ctas=2)
    mixed = "setp.ne.u32 %p0, %r0, 0; @%p0 ret; mov.u32 %r2, 1; setp.eq.u32 %p1, %r1, 0;"
    mixed += "@%p1 red.relaxed.gpu.global.add.u32 [%rd0], %r2; @!%p1 ld.global.b32 %r3, [%rd0];"
    assert any_raises(mixed, RaceError, ctas=2)
    assert any_raises(mixed.replace("ld.global.b32 %r3, [%rd0]", "st.global.b32 [%rd0], %r2"), RaceError, ctas=2)


def test_relaxed_accesses_show_old_values() -> None:
    """Two CTAs write one word and read the other's: all four outcomes occur, also that neither sees the other."""
    body = """
    setp.ne.u32 %p0, %r0, 0; @%p0 ret; mov.u32 %r2, 1; mul.wide.u32 %rd1, %r1, 64; add.s64 %rd1, %rd1, %rd0;
    st.relaxed.gpu.global.b32 [%rd1], %r2; xor.b32 %r3, %r1, 1; mul.wide.u32 %rd2, %r3, 64; add.s64 %rd2, %rd2, %rd0;
    ld.relaxed.gpu.global.b32 %r4, [%rd2]; add.u32 %r4, %r4, 10; st.global.b32 [%rd1+128], %r4;
    """
    outcomes = set()
    for settings in schedules(99):
        found, _ = launch(body, ctas=2, settings=settings)
        outcomes.add((int(found[32]), int(found[48])))
    assert outcomes == set(itertools.product((10, 11), repeat=2))


def test_a_dependent_launch_sees_its_primary_after_the_wait() -> None:
    """A late atomic of the primary launch has arrived after griddepcontrol.wait; without the wait there is a race."""
    first = "griddepcontrol.launch_dependents; mov.u32 %r2, 5; red.relaxed.gpu.global.max.s32 [%rd0], %r2;"
    second = "setp.ne.u32 %p0, %r0, 0; @%p0 ret; {} ld.global.b32 %r3, [%rd0]; mul.wide.u32 %rd1, %r1, 4;"
    second += "add.s64 %rd1, %rd1, %rd0; st.global.b32 [%rd1+128], %r3;"
    for settings in schedules(28):
        found, _ = launch([first, second.format("griddepcontrol.wait;")], ctas=3, settings=settings)
        assert found[32:35].tolist() == [5, 5, 5]
    assert any_raises([first, second.format("")], RaceError, ctas=3)


def test_a_cta_may_wait_for_one_that_has_a_place() -> None:
    """CTA 1 waits for CTA 0: with one resident CTA, only the order in which CTAs start avoids the deadlock."""
    body = """
    setp.ne.u32 %p0, %r0, 0; @%p0 ret; mov.u32 %r2, 1; setp.eq.u32 %p1, %r1, 0;
    @%p1 st.relaxed.gpu.global.b32 [%rd0], %r2; @%p1 ret;
    $spin: ld.relaxed.gpu.global.b32 %r3, [%rd0]; setp.eq.u32 %p2, %r3, 0; @%p2 bra $spin;
    """
    launch(body, ctas=2, settings=Settings(resident=1, order="up"))
    with pytest.raises(DeadlockError):
        launch(body, ctas=2, settings=Settings(resident=1, order="down"))
    launch(body, ctas=2, settings=Settings(resident=2, order="down"))


def test_equal_settings_give_equal_runs() -> None:
    """A seed fixes the schedule, so that a failing one can be repeated."""
    body = "mov.u32 %r3, 0; $next: atom.relaxed.gpu.global.add.u32 %r9, [%rd0], 1; add.u32 %r3, %r3, 1;"
    body += "setp.lt.u32 %p0, %r3, 3; @%p0 bra $next;" + AT_THREAD + "st.global.b32 [%rd1+64], %r9;"
    first, again, *others = (
        launch(body, ctas=3, words=200, settings=Settings(seed=seed))[0].tolist() for seed in (1, 1, 2, 3, 4, 5)
    )
    assert first == again
    assert any(other != first for other in others)
