"""The compile report for Hopper, without a GPU: casts, vector widths, spills and registers of every kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from typing import Any

import pytest

from nemotron_fp8_kernels import inspect
from nemotron_fp8_kernels.inspect import widest

OTHER_TRITON = os.environ.get("NEMOTRON_FP8_OTHER_TRITON")
"""Folder with another triton, from `pip install --no-deps --target FOLDER triton==3.6.0`."""

DTYPES = ("bfloat16", "float16", "float32")
REQUIRED = {
    "name",
    "dtype",
    "registers",
    "spills",
    "shared_bytes",
    "global_load_bits_max",
    "global_store_bits_max",
    "fp8_cvt",
    "local_memory",
}


@lru_cache
def report(dtype: str, triton_folder: str | None = None) -> list[dict[str, Any]]:
    """Return the report of one dtype from another process, where the kernels are compiled, not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [triton_folder] if triton_folder else []
    environment["PYTHONPATH"] = os.pathsep.join([*paths, *sys.path])
    command = [sys.executable, "-m", "nemotron_fp8_kernels.inspect", "--arch", "90", "--json"]
    ran = subprocess.run([*command, "--dtype", dtype], env=environment, check=True, capture_output=True, text=True)
    return json.loads(ran.stdout)  # type: ignore[no-any-return]


@pytest.fixture(
    params=[
        None,
        pytest.param(
            OTHER_TRITON,
            id="other-triton",
            marks=pytest.mark.skipif(not OTHER_TRITON, reason="NEMOTRON_FP8_OTHER_TRITON names no folder"),
        ),
    ]
)
def triton_folder(request: pytest.FixtureRequest) -> str | None:
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", DTYPES)
def test_report(dtype: str, triton_folder: str | None) -> None:
    """One hardware cast per element, 16-byte accesses, no spills, no flushed subnormals, registers for 16 warps."""
    entries = report(dtype, triton_folder)
    names = [entry["name"] for entry in entries]
    assert len(set(names)) == len(names)
    casting = {name.split("[")[0] for name in names if "amax" not in name and "dequant" not in name}
    assert casting == {"cast_kernel", "rows_kernel", "blocks_kernel", "grouped_kernel"}
    for entry in entries:
        name = entry["name"]
        assert entry.keys() >= REQUIRED
        assert entry["dtype"] == dtype
        assert entry["spills"] == entry["local_memory"] == entry["flush_to_zero"] == 0, name
        assert entry["global_load_bits_max"] == 128, name
        assert entry["fp8_cvt"] == entry["fp8_cvt_expected"], name
        if "amax" not in name:
            # A thread stores at least eight codes at once; eight codes come from a load of 16 bytes.
            eight = name.startswith("cast_kernel") or (name.startswith("rows_kernel") and "[512" not in name)
            assert entry["global_store_bits_max"] == (64 if eight else 128), name
        if "amax" not in name and "dequant" not in name:
            assert entry["fp8_cvt"] > 0, name
        # At least 16 warps must fit in the 65,536 registers of an SM to hide the memory latency.
        assert 65_536 // (entry["registers"] * entry["warps"] * 32) * entry["warps"] >= 16, name


def test_widest_reads_ptx() -> None:
    """Vector lanes times bits, with and without modifiers, loads and stores apart."""
    ptx = """
        ld.global.b32 {%r1}, [%rd1];
        @%p1 ld.global.L1::evict_first.L2::cache_hint.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1 + 0], %rd2;
        st.global.L1::evict_first.v2.b32 [%rd1 + 0], {%r1, %r2};
        ld.shared.v4.b64 {%rd3}, [%r1];
    """
    assert (widest(ptx, "ld"), widest(ptx, "st"), widest("", "st")) == (128, 64, 0)


def test_table_and_json_have_the_same_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --json the report is a table; --dtype selects input dtypes."""
    specs = [inspect.Spec(f"kernel {i}", dtype, None, {}, {}, 8, 64) for i, dtype in enumerate(DTYPES)]
    monkeypatch.setattr(inspect, "specs", lambda: specs)
    monkeypatch.setattr(
        inspect,
        "compile_spec",
        lambda spec, arch: inspect.Report(spec.name, spec.dtype, arch, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
    )
    assert inspect.main(["--json", "--arch", "100"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in entries] == ["kernel 0", "kernel 1", "kernel 2"]
    assert [entry["registers"] for entry in entries] == [100] * 3
    assert inspect.main(["--dtype", "float16", "--arch", "100"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == list(entries[1])
    assert row.split(maxsplit=2)[2].split() == [str(value) for value in list(entries[1].values())[1:]]
