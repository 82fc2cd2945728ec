"""The report of the compiled kernels, without compiling any: reading of machine code, model, and command line.

tests/ptx/test_machine_code.py compiles the kernels and requires their properties.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8_kernels import inspect
from nemotron_fp8_kernels.inspect import Report, __main__, lists, model, sass, widest

if TYPE_CHECKING:
    from nemotron_fp8_kernels.inspect import Spec

DUMP = """
        /*0000*/                   S2R R25, SR_TID.X ;                    /* 0x00000000002e7919 */
        /*0010*/                   ISETP.GE.AND P0, PT, R25, 0x8, PT ;
        /*0020*/               @P0 BRA 0x90 ;
        /*0030*/                   LDG.E.EF.128 R4, desc[UR4][R2.64] ;
        /*0040*/                   LDG.E.EF.128 R8, desc[UR4][R2.64+0x400] ;
        /*0050*/                   LOP3.LUT R0, R9, 0x7fff7fff, RZ, 0xc0, !PT ;
        /*0060*/              @!P1 BRA 0x80 ;
        /*0070*/                   CALL.REL.NOINC 0xf0 ;
        /*0080*/                   BRA 0xb0 ;
        /*0090*/              @!P2 LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*00a0*/                   LDG.E.U16 R8, desc[UR4][R2.64+0x2] ;
        /*00b0*/                   F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C R17, R17, R0, RZ ;
        /*00c0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00d0*/                   STG.E.EF.64 desc[UR4][R2.64], R16 ;
        /*00e0*/                   EXIT ;
        /*00f0*/                   RET.REL.NODEC R2 0x0 ;
"""
"""A program with a whole and a ragged path, and the slow case of a division."""

LOOP = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   VIMNMX.U16x2 R0, R0, R4, !PT ;
        /*0020*/              @!P0 BRA 0x0 ;
        /*0030*/                   EXIT ;
"""


def path(dump: str = DUMP, **options: int | str) -> sass.Path:
    return sass.main_path(sass.parse(dump), **options)  # type: ignore[arg-type]


def program(**changes: float) -> model.Program:
    """Return a program of 8 warps that holds 8,192 elements, as an H100 runs it with no trouble."""
    common = model.Program(
        warps=8,
        resident=8,
        elements=8192,
        read=2,
        reread=0,
        written=1,
        executed=240,
        after=200,
        serial=8,
        in_flight=16384,
    )
    return replace(common, **changes)  # type: ignore[arg-type]


def test_widest_reads_ptx() -> None:
    """Vector lanes times bits, with and without modifiers, loads and stores apart."""
    ptx = """
        ld.global.b32 {%r1}, [%rd1];
        @%p1 ld.global.L1::evict_first.L2::cache_hint.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1 + 0], %rd2;
        st.global.L1::evict_first.v2.b32 [%rd1 + 0], {%r1, %r2};
        ld.shared.v4.b64 {%rd3}, [%r1];
    """
    assert (widest(ptx, "ld"), widest(ptx, "st"), widest("", "st")) == (128, 64, 0)


def test_the_path_of_whole_tiles_is_found() -> None:
    """The path has the wide loads, neither the ragged ones nor the slow division."""
    found = path()
    assert [i.address for i in found.instructions] == [0, 16, 32, 48, 64, 80, 96, 128, 176, 192, 208, 224]
    assert found.loads_before_use() == found.data_loads() == 2
    assert found.after_loads() == (7, 1)
    assert found.narrow() == 0
    classes = found.classes
    assert (classes["load"], classes["store"], classes["cast"], classes["maximum"], classes["exchange"]) == (
        2,
        1,
        1,
        1,
        1,
    )
    assert sum(classes.values()) == found.executed == 12


def test_a_path_can_be_chosen_by_what_it_lacks() -> None:
    """Where one way casts and the other does not, ``without`` selects the other."""
    code = DUMP.replace("0x90 ;", "0xd0 ;")
    assert any(i.kind() == "cast" for i in path(code).instructions)
    assert not any(i.kind() == "cast" for i in path(code, without="F2FP").instructions)


def test_a_loop_counts_as_often_as_it_runs() -> None:
    found = path(LOOP, trips=5)
    assert (found.times, found.executed, found.data_loads()) == ((5, 5, 5, 1), 16, 5)
    assert found.loads_before_use() == 1


def test_narrow_accesses_are_counted() -> None:
    """Loads narrower than the widest one, except one: that of an amax."""
    code = DUMP.replace("LDG.E.EF.128 R8", "LDG.E.U16 R8").replace("LOP3.LUT R0", "LDG.E.U16 R0")
    assert path(code).narrow() == 1


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "expected"),
    [
        (63, 8, 1024, (4, "registers")),
        (32, 8, 0, (8, "registers")),
        (24, 8, 0, (8, "warps")),
        (24, 1, 0, (32, "programs")),
        (24, 8, 100 << 10, (2, "shared memory")),
        # 65 registers are allocated as 72: seven warps in each quarter of the registers.
        (65, 8, 0, (3, "registers")),
        (255, 16, 0, (0, "registers")),
    ],
)
def test_programs_per_sm(registers: int, warps: int, shared: int, expected: tuple[int, str]) -> None:
    assert model.programs_per_sm(registers, warps, shared) == expected


def test_predictions_name_the_limit() -> None:
    """A large tensor is limited by memory; each defect of a program becomes the limit, and costs what it must."""
    elements = 1 << 30

    def predicted(**changes: float) -> model.Prediction:
        return model.predict("", elements, 1, program(**changes))

    good = predicted()
    assert good.limit == "memory"
    assert 0.99 < good.share < 1
    assert good.hbm_bytes == good.crossbar_bytes == 3
    busy = predicted(executed=2400)
    assert busy.limit == "issue slots"
    assert busy.share == pytest.approx(1 / busy.issue_share, rel=0.01)
    few = predicted(resident=1, elements=1024)
    assert few.limit == "resident programs"
    assert few.share == pytest.approx(few.margin, rel=0.01)
    twice = predicted(reread=2, elements=1 << 17)
    assert twice.limit == "HBM bytes of the second read"
    assert (twice.hbm_bytes, twice.crossbar_bytes) == (5, 5)
    assert twice.share == pytest.approx(0.6, rel=0.01)
    # Two readings from L2 cost nothing in HBM.
    assert predicted(reread=2).hbm_bytes == 3
    small = model.predict("", 1 << 22, 1, program())
    assert small.limit == "finish of the last program"
    assert small.share < good.share


def test_l2_saves_bytes_of_a_tensor_that_it_keeps() -> None:
    amax, cast = program(written=0), program()
    sizes = (1 << 22, 1 << 24, 1 << 28)
    bytes_of = [model.predict_tensor("", size, amax, cast, kept=64 << 20).hbm_bytes for size in sizes]
    assert bytes_of == [3, 5 - (24 << 20) / (1 << 24), 5]


@pytest.mark.parametrize("count", [1, 40])
def test_a_simulated_list_moves_each_byte(count: int) -> None:
    """All tickets run, whatever waits; what leaves L2 is read again, and the time is that of the bytes or longer."""
    amax, cast = program(written=0), program()
    size = 1 << 20
    found = lists.predict_list("", [size + 5] * count, 16384, 2, amax, cast, 3)
    assert found.elements == count * (size + 5)
    assert found.hbm_bytes == pytest.approx(3, rel=1e-6)
    assert found.crossbar_bytes == pytest.approx(5, rel=1e-6)
    assert found.seconds > 3 * found.elements / model.ROOF
    assert found.margin > 1
    large = lists.predict_list("", [40 << 20] * 2, 16384, 2, amax, cast, 3)
    assert large.limit == "HBM bytes of tensors that left L2"
    assert 4 < large.hbm_bytes < 5


def test_a_list_cannot_run_in_a_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Casts before the amaxes of their group wait for ever: the simulation says so."""
    order = lists.tickets([1 << 23], 16384, 2)
    monkeypatch.setattr(lists, "tickets", lambda *_: sorted(order, key=lambda chunk: not chunk.cast))
    with pytest.raises(RuntimeError, match="order of the tickets"):
        lists.predict_list("", [1 << 23], 16384, 2, program(written=0), program(), 3)


def test_specs_cover_every_kernel_and_dtype() -> None:
    """Every kernel and input dtype, each name once, and every argument of a kernel as a type or a constant."""
    specs = inspect.specs()
    assert len({(spec.name, spec.dtype) for spec in specs}) == len(specs)
    assert {spec.dtype for spec in specs} == set(inspect.INPUTS)
    for spec in specs:
        assert {*spec.types, *spec.constants} == set(spec.kernel.arg_names), spec.name
        assert not spec.types.keys() & spec.constants.keys(), spec.name


def test_table_and_json_have_the_same_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --json the report is a table, with the predictions; options select dtypes and kernels."""
    found = model.predict("4096x4096", 1 << 24, 9, program())

    def reports(specs: list[Spec], arch: int) -> list[Report]:
        return [
            Report(
                spec.name, spec.dtype, arch, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, issue_share=0.25, predictions=(found,)
            )
            for spec in specs
        ]

    monkeypatch.setattr(__main__, "report_all", reports)
    assert __main__.main(["--json", "--arch", "100", "--kernel", "grouped_kernel[", "--kernel", "amax_kernel[odd"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in entries] == ["amax_kernel[odd]", "grouped_kernel[power-of-two]"] * 3
    assert [entry["registers"] for entry in entries] == [100] * 6
    assert __main__.main(["--json-lines", "--arch", "100", "--kernel", "grouped_kernel["]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == entries[1::2]
    assert __main__.main(["--dtype", "float16", "--kernel", "grouped_kernel[", "--arch", "100"]) == 0
    header, row, empty, title, labels, prediction = capsys.readouterr().out.splitlines()
    assert header.split() == list(__main__.COLUMNS)
    assert row.split()[:3] == ["grouped_kernel[power-of-two]", "float16", "100"]
    assert (empty, title) == ("", "Predicted:")
    assert "share of the roof" in labels
    assert f"{found.share:.1%}" in prediction
