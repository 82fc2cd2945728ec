"""Print the exchanges under a predicate in kernels for small blocks, as JSON: ``python -m tests.ptx.small_blocks``.

Such blocks have programs of one warp, whose reductions are single instructions. A process of its own compiles them with
the triton that it finds.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

from nemotron_fp8_kernels.gpu.configs import block_tile
from nemotron_fp8_kernels.inspect.report import compile_spec
from nemotron_fp8_kernels.inspect.sass import guarded_exchanges, parse
from nemotron_fp8_kernels.inspect.spec import specs

BLOCKS = ((1, 32), (2, 256), (4, 32), (5, 48), (16, 32), (24, 70), (32, 16))
VARIANTS = ("blocks_kernel[1000/4104/1001]", "blocks_kernel[codes apart]")


def found() -> dict[str, list[str]]:
    """Return the instructions by kernel, block, and what the kernel computes."""
    exchanges = {}
    for spec, block, cast in product(specs(("bfloat16",)), BLOCKS, (True, False)):
        if spec.name not in VARIANTS:
            continue
        high, wide, warps = block_tile(block, 2, edges=True)
        sides = {"B0": block[0], "B1": block[1], "T0": high, "T1": wide}
        types, constants = dict(spec.types), spec.constants | sides
        if not cast:
            constants |= {"CAST": False, "q_ptr": None, "scale_ptr": None}
            types = {name: kind for name, kind in types.items() if name not in ("q_ptr", "scale_ptr")}
        compiled = compile_spec(replace(spec, types=types, constants=constants, warps=warps))
        kind = "cast" if cast else "amax"
        instructions = guarded_exchanges(parse(compiled.dump))
        exchanges[f"{spec.name} {block} {kind}"] = [f"@{each.predicate} {each.opcode}" for each in instructions]
    return exchanges


if __name__ == "__main__":
    print(json.dumps(found()))
