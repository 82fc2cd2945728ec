"""Compile report of the kernels, without a GPU: ``python -m nemotron_fp8_kernels.inspect --arch 90 --json``.

Each kernel is compiled once per input dtype in its aligned, contiguous specialization: pointers, sizes and strides
are multiples of 16. The report is read from the PTX and the machine code. It shows register spills and vector
widths, which decide whether a kernel reaches the memory roof.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .gpu.configs import Rows

INPUTS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
"""Names of the input dtypes in Triton signatures."""


@dataclass(frozen=True)
class Spec:
    """Compilation of a kernel: its argument types and constants.

    Attributes:
        name: kernel and variant.
        dtype: dtype of the weights.
        kernel: the Triton function.
        types: argument types in order, without ``constexpr``; a trailing ``:16`` marks multiples of 16.
        constants: values of the ``constexpr`` arguments.
        warps: warps of a program.
        elements: elements that a program holds.
        casts: casts of these elements in the code (one, or one each for whole and ragged tiles).
        tail: elements of an additional cast, at least one per thread.
        options: additional compile options.
    """

    name: str
    dtype: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    elements: int
    casts: int = 0
    tail: int = 0
    options: dict[str, Any] = field(default_factory=dict)


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
        tile: elements that a program holds.
        warps: warps of a program.
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
    tile: int
    warps: int


def specs() -> list[Spec]:
    """Return the compilations of every kernel for every input dtype, specialized for aligned contiguous tensors."""
    return [spec for dtype in INPUTS for spec in _specs(dtype)]


def _specs(dtype: str) -> list[Spec]:
    import triton.language as tl

    from .gpu import amax, blocks, cast, configs, dequant, grouped, rows

    w, q, bits, scale, size = f"*{INPUTS[dtype]}:16", "*fp8e4nv:16", "*i32:16", "*fp32:16", "i64:16"
    two_d = {"rows": "i32", "columns": "i32:16", "w_stride": "i64:16", "q_stride": "i64:16", "phase": "i32"}
    tensors = {"w_ptr": w, "q_ptr": q, "amax_ptr": bits, "scale_ptr": scale}
    spec = partial(Spec, dtype=dtype)
    itemsize = 4 if dtype == "float32" else 2
    # Several rows per program; rows of experts, of the 340B, and of its MLP; rows that no program holds.
    widths = {str(width): configs.rows_plan(width, itemsize) for width in (512, 2048, 18432, 73728, 147456)}
    block = {"B0": 128, "B1": 128, "T0": 128, "T1": 128}
    steps = {"across": "i32", "amax_down": "i32", "amax_across": "i32"}
    no_cast = {"q_ptr": None, "scale_ptr": None, "GIVEN": False, "CAST": False, "EDGES": False, "WIDTH": 8}
    read_only = {"w_ptr": w, "amax_ptr": bits}
    return [
        *(
            spec(
                f"amax_kernel[{policy}]",
                kernel=amax.amax_kernel,
                types={"w_ptr": w, "amax_ptr": bits, "n": size, "phase": "i32"},
                constants={
                    "TILE": configs.AMAX.tile,
                    "TILES": configs.AMAX.tiles,
                    "POLICY": policy,
                    "PDL": True,
                    "EDGES": False,
                },
                warps=configs.AMAX.warps,
                elements=configs.AMAX.tile * configs.AMAX.tiles,
                options={"launch_pdl": True},
            )
            for policy in ("evict_first", "evict_last")
        ),
        *(
            spec(
                "cast_kernel" + "[original]" * original,
                kernel=cast.cast_kernel,
                types=tensors | {"amax_ptr": scale if original else bits, "n": size, "phase": "i32"},
                constants={
                    "TILE": configs.CAST.tile,
                    "ORIGINAL": original,
                    "REVERSE": True,
                    "PDL": not original,
                    "EDGES": False,
                    "WIDTH": 8,
                },
                warps=configs.CAST.warps,
                elements=configs.CAST.tile,
                casts=2,
                options={"launch_pdl": not original},
            )
            for original in (False, True)
        ),
        *(
            spec(
                f"rows_kernel[{width}{',given' * given}]",
                kernel=rows.rows_kernel,
                types=tensors | two_d,
                constants=_rows(plan) | {"GIVEN": given, "CAST": True, "EDGES": False, "WIDTH": 8},
                warps=plan.warps,
                elements=plan.height * plan.tile * plan.pieces,
                casts=1,
            )
            for width, plan in widths.items()
            for given in (False, True)
        ),
        *(
            spec(
                f"rows_kernel[{width},amax]",
                kernel=rows.rows_kernel,
                types=read_only | two_d,
                constants=no_cast | _rows(plan),
                warps=plan.warps,
                elements=plan.height * plan.tile * plan.pieces,
            )
            for width, plan in widths.items()
        ),
        *(
            spec(
                "blocks_kernel" + name,
                kernel=blocks.blocks_kernel,
                types=tensors | two_d | steps | ({"amax_ptr": scale} if original else {}),
                constants=block | {"GIVEN": given, "CAST": True, "ORIGINAL": original, "EDGES": False, "WIDTH": 8},
                warps=configs.BLOCKS.warps,
                elements=128 * 128,
                casts=1,
            )
            for name, given, original in (
                ("", False, False),
                ("[given]", True, False),
                ("[original]", True, True),
            )
        ),
        spec(
            "blocks_kernel[amax]",
            kernel=blocks.blocks_kernel,
            types=read_only | two_d | steps,
            constants=block | no_cast | {"ORIGINAL": False},
            warps=configs.BLOCKS.warps,
            elements=128 * 128,
        ),
        spec(
            "dequant_kernel",
            kernel=dequant.dequant_kernel,
            types={"q_ptr": q, "scale_ptr": scale, "w_ptr": w, "n": size},
            constants={"TILE": configs.DEQUANT.tile, "EDGES": False, "WIDTH": 8},
            warps=configs.DEQUANT.warps,
            elements=configs.DEQUANT.tile,
        ),
        spec(
            "dequant_rows_kernel",
            kernel=dequant.dequant_rows_kernel,
            types={"q_ptr": q, "scale_ptr": scale, "w_ptr": w, "rows": "i32", "columns": "i32:16"}
            | {"q_stride": "i64:16", "across": "i32", "scale_down": "i32", "scale_across": "i32"},
            constants={"B0": 128, "B1": 128, "T0": 32, "T1": 128, "LONG": False, "EDGES": False, "WIDTH": 8},
            warps=configs.DEQUANT.warps,
            elements=32 * 128,
        ),
        spec(
            "grouped_kernel",
            kernel=grouped.grouped_kernel,
            types={"tensors_ptr": "*i64:16", "work_ptr": "*i32:16", "tickets": "i32", "ticket_ptr": "*i32:16"}
            | {"found_ptr": "*i32:16", "slots_ptr": "*i32", "scale_ptr": scale},
            constants={
                "DTYPE": getattr(tl, dtype),
                "TILE": configs.GROUPED.tile,
                "TILES": configs.GROUPED.tiles,
                "THREADS": 32 * configs.GROUPED.warps,
            },
            warps=configs.GROUPED.warps,
            elements=configs.GROUPED.tile * configs.GROUPED.tiles,
            casts=1,
            tail=16,
        ),
    ]


def _rows(plan: Rows) -> dict[str, Any]:
    return {"ROWS": plan.height, "TILE": plan.tile, "PIECES": plan.pieces, "HELD": plan.held}


def compile_spec(spec: Spec, arch: int = 90) -> Report:
    """Compile a kernel for compute capability ``arch`` (90 for Hopper) and report its properties."""
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
    return _read(spec, compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata.shared)


def _read(spec: Spec, ptx: str, cubin: bytes, shared: int) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        dump = _cuobjdump(path)
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump)}
    return Report(
        name=spec.name,
        dtype=spec.dtype,
        registers=used["REG"],
        spills=len(re.findall(r"\b(?:LDL|STL)\b", dump)),
        shared_bytes=shared,
        global_load_bits_max=widest(ptx, "ld"),
        global_store_bits_max=widest(ptx, "st"),
        fp8_cvt=len(re.findall(r"\bcvt\.rn\.satfinite\.e4m3x2\.f32\b", ptx)),
        fp8_cvt_expected=spec.casts * spec.elements // (spec.warps * 32 * 2) + -(-spec.tail // (spec.warps * 32)),
        local_memory=used["STACK"] + used["LOCAL"],
        flush_to_zero=len(re.findall(r"\.ftz\b", ptx)),
        tile=spec.elements,
        warps=spec.warps,
    )


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


def main(arguments: list[str] | None = None) -> int:
    """Print the report as a table, or with ``--json`` as a list of objects."""
    parser = argparse.ArgumentParser(prog="nemotron_fp8_kernels.inspect", description=__doc__)
    parser.add_argument("--arch", type=int, default=90, help="compute capability (90: Hopper)")
    parser.add_argument(
        "--dtype", choices=tuple(INPUTS), action="append", help="report only this input dtype (repeatable)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    options = parser.parse_args(arguments)
    chosen = options.dtype or tuple(INPUTS)
    reports = [asdict(compile_spec(spec, options.arch)) for spec in specs() if spec.dtype in chosen]
    if options.json:
        print(json.dumps(reports, indent=1))
        return 0
    columns = list(reports[0])
    rows = [columns, *([str(report[column]) for column in columns] for report in reports)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
