"""Programs of one warp in machine code: no thread is left out of a reduction.

An H200 showed what the emulator of PTX cannot: ptxas 12.8 translated a reduction in a branch to a predicated
instruction, and used the predicate for something else before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from nemotron_fp8_kernels.inspect.sass import guarded_exchanges, parse
from tests.ptx.test_machine_code import TRITONS

pytestmark = pytest.mark.ptx

MISCOMPILED = """
        /*1290*/                   ISETP.GE.AND P0, PT, R28.reuse, R17, PT ;
        /*15a0*/                   LOP3.LUT R0, R0, 0xffff, RZ, 0xc0, !PT ;
        /*15b0*/               @P0 REDUX.MAX.S32 UR7, R2 ;
        /*1620*/                   REDUX.MAX.S32 UR6, R0 ;
        /*1770*/               @P0 EXIT ;
"""
"""Lines of the kernel that lost amaxes on the device."""


def test_the_fault_is_seen() -> None:
    assert [each.address for each in guarded_exchanges(parse(MISCOMPILED))] == [0x15B0]


@pytest.mark.parametrize("folder", TRITONS)
def test_no_reduction_of_one_warp_is_predicated(folder: str | None) -> None:
    """Compiled with the pinned triton, and with another one if the environment names its folder."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*([folder] if folder else []), *sys.path])
    command = [sys.executable, "-m", "tests.ptx.small_blocks"]
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    exchanges = json.loads(ran.stdout)
    assert len(exchanges) == 28
    assert {name: found for name, found in exchanges.items() if found} == {}
