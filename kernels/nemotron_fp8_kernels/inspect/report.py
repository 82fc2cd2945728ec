"""Compile a kernel, and report its properties and its predicted speed."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from . import model, sass
from .model import Prediction, Program
from .spec import LISTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .spec import Spec


@dataclass(frozen=True)
class Report:
    """Properties of a compiled kernel.

    Attributes:
        name: kernel and variant.
        dtype: dtype of the weights.
        registers: registers of a thread.
        spills: loads and stores of spilled registers in the machine code.
        shared_bytes: bytes of shared memory of a program.
        global_load_bits_max: widest load from global memory, in bits.
        global_store_bits_max: widest store to global memory, in bits.
        fp8_cvt: ``cvt.rn.satfinite.e4m3x2.f32`` instructions; each casts two elements of each thread.
        fp8_cvt_expected: instructions that cast every element of every path exactly once.
        local_memory: bytes of local memory and stack of a thread.
        flush_to_zero: float32 instructions that flush subnormals.
        guarded_exchanges: exchanges between threads that a predicate guards (`sass.guarded_exchanges`).
        tile: elements that a program holds.
        warps: warps of a program.
        programs_per_sm: programs that an SM holds.
        programs_limit: the limit of an SM that determines this number.
        instructions: executed instructions of a thread on the path of whole tiles, per 16 elements.
        classes: the same by class.
        narrow_accesses: loads of weights or stores of codes on that path of fewer bits than the widest ones.
        loads_before_use: 16-byte loads that a thread issues before it uses the result of one.
        in_flight_per_sm: bytes of these loads on an SM.
        issue_share: share of issue slots at the roof.
        predictions: predicted speed for several shapes.
        triton: version of triton.
        arch: compute capability, as in ``--arch``.
    """

    name: str
    dtype: str
    registers: int
    spills: int
    shared_bytes: int
    global_load_bits_max: int
    global_store_bits_max: int
    fp8_cvt: int
    fp8_cvt_expected: int
    local_memory: int
    flush_to_zero: int
    guarded_exchanges: int
    tile: int
    warps: int
    programs_per_sm: int = 0
    programs_limit: str = ""
    instructions: float = 0.0
    classes: dict[str, float] = field(default_factory=dict)
    narrow_accesses: int = 0
    loads_before_use: int = 0
    in_flight_per_sm: int = 0
    issue_share: float = 0.0
    predictions: tuple[Prediction, ...] = ()
    triton: str = ""
    arch: int = 0


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel: its specification, device, PTX, dump of the machine code, and bytes of shared memory."""

    spec: Spec
    arch: int
    ptx: str
    dump: str
    shared: int


def compile_spec(spec: Spec, arch: int = 90) -> Compiled:
    """Compile a kernel for compute capability ``arch`` (90 for Hopper)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(spec.types)
    signature = {
        name: spec.types[name].removesuffix(":16") if name in names else "constexpr" for name in spec.kernel.arg_names
    }
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(spec.kernel.arg_names)
        if spec.types.get(name, "").endswith(":16")
    }
    constants = {(spec.kernel.arg_names.index(name),): value for name, value in spec.constants.items()}
    source = ASTSource(spec.kernel, signature, constants, aligned)
    options = {"num_warps": spec.warps} | spec.options
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        return Compiled(spec, arch, compiled.asm["ptx"], _cuobjdump(path), compiled.metadata.shared)


def report_all(specs: Sequence[Spec], arch: int = 90) -> list[Report]:
    """Compile kernels and report on each; predictions of a pair of kernels are those of the second."""
    amaxes: dict[str, Program] = {}
    reports = []
    for spec in specs:
        compiled = compile_spec(spec, arch)
        report, program = read(compiled)
        if spec.name == "amax_kernel[evict_first]":
            amaxes[spec.dtype] = program
        reports.append(_with_predictions(report, compiled, program, amaxes.get(spec.dtype)))
    return reports


def read(compiled: Compiled) -> tuple[Report, Program]:
    """Report the properties of a compiled kernel, and the work of one of its programs."""
    spec, dump, ptx = compiled.spec, compiled.dump, compiled.ptx
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump)}
    threads = 32 * spec.warps
    instructions = sass.parse(dump)
    path = sass.main_path(instructions, trips=spec.trips)
    resident, limit = model.programs_per_sm(used["REG"], spec.warps, compiled.shared)
    program = _program(spec, path, resident)
    per_thread = spec.elements * spec.trips / threads
    report = Report(
        name=spec.name,
        dtype=spec.dtype,
        registers=used["REG"],
        spills=len(re.findall(r"\b(?:LDL|STL)\b", dump)),
        shared_bytes=compiled.shared,
        global_load_bits_max=widest(ptx, "ld"),
        global_store_bits_max=widest(ptx, "st"),
        fp8_cvt=len(re.findall(r"\bcvt\.rn\.satfinite\.e4m3x2\.f32\b", ptx)),
        fp8_cvt_expected=spec.casts * spec.elements // (threads * 2) + -(-spec.tail // (2 * threads)),
        local_memory=used["STACK"] + used["LOCAL"],
        flush_to_zero=len(re.findall(r"\.ftz\b", ptx)),
        guarded_exchanges=len(sass.guarded_exchanges(instructions)),
        tile=spec.elements,
        warps=spec.warps,
        programs_per_sm=resident,
        programs_limit=limit,
        instructions=round(16 * path.executed / per_thread, 1),
        classes={name: round(16 * count / per_thread, 1) for name, count in path.classes.items()},
        narrow_accesses=path.narrow(),
        loads_before_use=path.loads_before_use(),
        in_flight_per_sm=int(program.in_flight * resident),
        issue_share=round(program.issue, 3),
        triton=version("triton"),
        arch=compiled.arch,
    )
    return report, program


def _itemsize(spec: Spec) -> int:
    return 4 if spec.dtype == "float32" else 2


def _program(spec: Spec, path: sass.Path, resident: int, columns: int = 0) -> Program:
    """Describe a program of a kernel; with ``columns``, the lanes beyond the end of a row do not count."""
    elements: float = spec.elements * spec.trips
    if columns:
        elements = spec.height * columns
    read, written = _itemsize(spec), spec.written
    if written is None:
        read, written = 1, read
    return Program.of(path, spec.warps, resident, elements, read, reads=spec.reads, written=written)


def _with_predictions(report: Report, compiled: Compiled, program: Program, amax: Program | None) -> Report:
    from ..gpu import configs

    spec = compiled.spec
    path = sass.main_path(sass.parse(compiled.dump), trips=spec.trips)
    found: list[Prediction] = []
    for rows, columns in spec.shapes:
        shape, elements = f"{rows}x{columns}", rows * columns
        if spec.name.startswith("cast_kernel"):
            assert amax is not None
            found.append(model.predict_tensor(shape, elements, amax, program, configs.KEPT_BYTES[1]))
            continue
        if spec.height:
            one = _program(spec, path, program.resident, columns)
            programs = ceil(rows / spec.height)
        else:
            # Blocks at the right and at the lower end of a tensor may be ragged.
            programs = _tiles(spec, rows, columns)
            one = replace(program, elements=elements / programs)
        found.append(model.predict(shape, elements, programs, one))
    if spec.name == "grouped_kernel":
        found = _lists(compiled, program)
        # The chain of a program has an amax and a cast; both must leave issue slots.
        report = replace(report, issue_share=round(found[0].issue_share, 3))
    return replace(report, predictions=tuple(found))


def _tiles(spec: Spec, rows: int, columns: int) -> int:
    if "T0" not in spec.constants:
        return ceil(rows * columns / spec.elements)
    sides: dict[str, int] = spec.constants
    return ceil(rows / sides["T0"]) * ceil(columns / sides["T1"])


def _lists(compiled: Compiled, cast: Program) -> list[Prediction]:
    """Predict the speed of the grouped kernel on lists of tensors."""
    from ..gpu import configs
    from .lists import predict_list

    spec = compiled.spec
    path = sass.main_path(sass.parse(compiled.dump), without="F2FP.SATFINITE")
    amax = Program.of(path, spec.warps, cast.resident, spec.elements, _itemsize(spec), written=0)
    return [
        predict_list(
            f"{count} x {size / 2**20:.1f} M",
            [size] * count,
            spec.elements,
            _itemsize(spec),
            amax,
            cast,
            configs.PROGRAMS_PER_SM,
        )
        for count, size in LISTS
    ]


def widest(ptx: str, operation: str) -> int:
    """Return the bits of the widest ``ld.global`` or ``st.global`` in ``ptx``; 0 if there is none.

    Args:
        ptx: PTX of a kernel.
        operation: ``ld`` or ``st``.
    """
    pattern = rf"\b{operation}\.(?:[\w:]+\.)*?global(?:\.[A-Za-z]\w*(?:::\w+)*)*?(?:\.v(\d))?\.[busf](\d+)\b"
    return max((int(lanes or 1) * int(bits) for lanes, bits in re.findall(pattern, ptx)), default=0)


def _cuobjdump(path: Path) -> str:
    from triton import knobs

    # triton ships the tool together with the assembler.
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
