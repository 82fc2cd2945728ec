"""Random launches of the grouped kernel under random and adversarial schedules, each fixed by one number.

``python -m tests.ptx.schedules RESIDENT SEED`` repeats one.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nemotron_fp8_kernels import reference
from nemotron_fp8_kernels.grouping import partition
from tests.support.ptxemu.schedule import ORDERS, POLICIES, Settings

if TYPE_CHECKING:
    from tests.ptx.compiled import Compiled

RESIDENT = (1, 2, 7, 132)
"""Numbers of resident programs."""

CONFIGS = ((256, 1, 1), (256, 2, 2), (512, 2, 4), (128, 3, 4))
"""Tile, tiles and warps: small, so that small tensors have many chunks; beside them the production configuration."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Case:
    """One launch, or two with equal tables.

    Attributes:
        sizes: elements of each tensor.
        dtype: of all.
        groups: tensors that share a scale.
        config: tile, tiles and warps; None for the production configuration.
        programs: CTAs of the launch.
        lead: elements by which amaxes are ahead of casts.
        l2_bytes: bytes of a batch above which it is cast from its end.
        two_launches: amaxes in one launch, casts in another.
        runs: runs with the same tables, each with other weights.
        rounding: rounding of the scales.
        settings: the schedule.
    """

    sizes: tuple[int, ...]
    dtype: torch.dtype
    groups: list[list[int]]
    config: tuple[int, int, int] | None
    programs: int
    lead: int
    l2_bytes: int
    two_launches: bool
    runs: int
    settings: Settings
    rounding: Any


def draw(resident: int, seed: int) -> Case:
    """Draw a case with a number of resident programs."""
    rng = random.Random(f"{resident} {seed}")
    config = None if rng.random() < 0.06 else rng.choice(CONFIGS)
    chunk = config[0] * config[1] if config else 16_384
    per_warp = rng.random() < 0.35
    # Warp by warp, a launch takes many more turns.
    chunks = {1: 8, 2: 10, 7: 16, 132: 140}[resident] // (2 if per_warp else 1)
    if config is None:
        chunks = 4
    sizes: list[int] = []
    while sum(-(-size // chunk) for size in sizes) < chunks:
        whole = chunk * rng.choice((0, 0, 1, 1, 1, 2, 3, rng.randrange(1, max(2, chunks // 2))))
        sizes.append(max(1, whole + rng.choice((0, 0, 1, -1, 15, 16, 17, -16, rng.randrange(chunk)))))
    labels = [rng.choice((None, None, 0, 1)) for _ in sizes]
    shared = [[i for i, label in enumerate(labels) if label == wanted] for wanted in (0, 1)]
    dtype = rng.choice(DTYPES)
    return Case(
        sizes=tuple(sizes),
        dtype=dtype,
        groups=partition(len(sizes), [group for group in shared if group]),
        config=config,
        programs=rng.choice((resident, resident + 1, 3 * resident, 396)),
        lead=chunk * rng.choice((1, 2, 5, resident)),
        l2_bytes=dtype.itemsize * chunk * rng.choice((1, 3, 1000)),
        two_launches=rng.random() < 0.05,
        runs=2 if rng.random() < 0.1 else 1,
        settings=Settings(
            resident=resident,
            policy=rng.choice(POLICIES),
            order=rng.choice(ORDERS),
            per_warp=per_warp,
            weak=rng.random() < 0.9,
            delay=rng.choice((0.1, 0.5, 0.95)),
            stale=rng.choice((0.1, 0.4, 0.8)),
            seed=seed,
        ),
        rounding=rng.choice(("none", "none", "none", "power-of-two", "mx")),
    )


def run(compiled: Compiled, case: Case) -> None:
    """Run a case and compare all codes and scales with the reference; each byte of the codes is stored once."""
    many = compiled.many
    compiled.restart(case.settings)
    compiled.programs = case.programs
    kept = many.configs.LEAD, many.configs.L2_BYTES
    many.configs.LEAD, many.configs.L2_BYTES = case.lead, case.l2_bytes
    _forget(many)
    try:
        weights = [torch.zeros(size, dtype=case.dtype) for size in case.sizes]
        codes = [torch.zeros(size, dtype=torch.uint8).view(torch.float8_e4m3fn) for size in case.sizes]
        config = many.configs.Config(*case.config) if case.config else many.configs.GROUPED
        prepared = many.prepare(weights, codes, case.groups, case.two_launches, config, case.rounding)
        for number in range(case.runs):
            generator = torch.Generator().manual_seed(case.settings.seed + number)
            for index, (w, q) in enumerate(zip(weights, codes, strict=True)):
                w.copy_(torch.randn(len(w), generator=generator) * 2.0 ** -(index % 9))
                w[torch.randint(len(w), (), generator=generator)] = -(9.0 + number) * 2.0 ** -(index % 9)
                q.view(torch.uint8).fill_(0x55)
            compiled.call(prepared.run, equal=True)
            for place, group in enumerate(case.groups):
                bits = torch.stack([reference.amax_bits(weights[index]) for index in group]).max()
                for index in group:
                    expected = reference.quantize_with_amax(weights[index], bits, rounding=case.rounding)
                    compiled.same((codes[index], prepared.scales[place]), expected)
            total = sum(case.sizes)
            assert total < compiled.stored <= total + 4 * len(case.sizes)
    finally:
        many.configs.LEAD, many.configs.L2_BYTES = kept
        _forget(many)
    compiled.counts["schedules"] += case.runs


def _forget(many: Any) -> None:
    """Empty the caches of the module: they do not know that the two constants can change."""
    for value in vars(many).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()


def main() -> None:
    """Repeat one case and print it."""
    from tests.ptx.compiled import Compiled
    from tests.ptx.conftest import CACHE
    from tests.support.ptxemu.driver import install

    resident, seed = map(int, sys.argv[1:])
    case = draw(resident, seed)
    print(case)
    run(Compiled(install(CACHE)), case)
    print("no error")


if __name__ == "__main__":
    main()
