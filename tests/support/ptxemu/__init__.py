"""Emulator of the PTX that Triton generates for Hopper: it runs compiled kernels without a GPU.

- parse.py, operands.py, pure.py, effects.py, lower.py: from PTX text over basic blocks to numpy over lanes. Unknown
  instructions and modifiers raise `UnsupportedError`.
- formats.py, integers.py: arithmetic, with the number formats calculated from values.
- storage.py, memory.py, clocks.py: global memory with bounds, alignment, data races, and weak atomics.
- shared.py: shared memory with races by the interval between barriers.
- units.py, schedule.py: lanes in lockstep under masks; CTAs in batches, or as coroutines (whole CTAs or single warps)
  under a schedule.
- driver.py: a Triton driver, so that Triton's own specialization, compilation and launch run unchanged.

Of the memory model it has causality by release, acquire and fences (scope ``cta`` orders nothing between CTAs), chains
of read-modify-writes, ``bar.sync`` and ``griddepcontrol.wait``, lane by lane. A plain access that conflicts with an
access of another CTA without causality is an error in any schedule. Relaxed atomics whose result is unused may be late;
strong loads, and read-modify-writes that change nothing, may return old values. With programmatic dependent launch, the
CTAs of the second launch start when all CTAs of the first have signaled or ended.

It does not have: timing and fairness, the L1 cache (a plain load sees every write that happened before it), more of
``fence.sc`` than ``acq_rel``, reordering of plain accesses within a lane (races stand for it), atomics on shared
memory, clusters, TMA, matrix instructions, local memory, calls, and all that ptxas does with the PTX.
"""
