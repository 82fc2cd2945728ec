"""Compilations by Inductor for the stage `peers`, beside stages that use the processors little; nothing is timed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benchmarks.gpu.steps.peers import compiled

if TYPE_CHECKING:
    from benchmarks.gpu.run import Run


def go(run: Run, _stage: str, granularity: str) -> None:
    """Compile all cases of one granularity, which fills the cache on the disk."""
    for name in run.peers:
        with run.step("compile", shape=name, granularity=granularity):
            function = compiled(run, granularity)
            w = torch.randn(run.shapes[name], device=run.device, dtype=torch.bfloat16)
            run.wait()
            function(w)
            run.wait()
            run.emit(case="ready", shape=name, granularity=granularity)
