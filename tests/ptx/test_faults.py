"""Each planted fault is found, and reported as what it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.ptx.faults import CHECKS, PTX_FAULTS, SOURCE_FAULTS, PtxFault, SourceFault
from tests.support.ptxemu.schedule import Settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.ptx.compiled import Compiled

pytestmark = pytest.mark.ptx


@pytest.mark.ptx(ci=2)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_checks_pass_without_a_fault(compiled: Compiled, check: Callable[[Compiled], None]) -> None:
    check(compiled)


@pytest.mark.ptx(ci=18)
@pytest.mark.parametrize("fault", SOURCE_FAULTS, ids=lambda fault: fault.name)
def test_faults_of_the_source_are_found(compiled: Compiled, fault: SourceFault, tmp_path: Path) -> None:
    planted = fault.plant(compiled.emulator, tmp_path)
    planted.restart(Settings())
    with pytest.raises(fault.errors):
        fault.check(planted)
    compiled.counts["faults found"] += 1


@pytest.mark.ptx(ci=6)
@pytest.mark.parametrize("fault", PTX_FAULTS, ids=lambda fault: fault.name)
def test_faults_of_the_ptx_are_found(compiled: Compiled, fault: PtxFault, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = 0

    def rewrite(text: str) -> str:
        nonlocal changes
        changed, count = fault.rewrite(text)
        changes += count
        return changed

    monkeypatch.setattr(compiled.emulator, "rewrite", rewrite)
    with pytest.raises(fault.errors):
        fault.check(compiled)
    assert changes, f"{fault.name}: no kernel has {fault.pattern}"
    compiled.counts["faults found"] += 1
