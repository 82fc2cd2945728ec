"""Compilations of the kernels in their production configurations, for the shapes of real weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..gpu.configs import Rows

INPUTS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
"""Names of the input dtypes in Triton signatures."""

WEIGHTS = (
    (1856, 2688),
    (2688, 1856),
    (2048, 4096),
    (7168, 2048),
    (4096, 4096),
    (6144, 6144),
    (7168, 7168),
    (8192, 8192),
    (4096, 14336),
    (4096, 16384),
    (16384, 4096),
    (10240, 10304),
    (18432, 18432),
    (18432, 73728),
    (73728, 18432),
)
"""Rows and columns of weights of real models."""

RAGGED = ((4096, 1000), (4096, 4104), (4096, 1001))
"""Weights whose columns are no multiple of 16; the vectors of the last one start at another place in each row."""

ROUNDED = ((2048, 4096), (4096, 16384), (18432, 18432))
"""Weights for which the speed with scales that are powers of two is predicted."""

LISTS = ((600, 300 << 10), (128, 2 << 20), (64, 5 << 20), (64, 8 << 20), (64, 12 << 20), (32, 16 << 20))
"""Lists of tensors: number, and elements of each."""


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
        tail: elements of an additional cast.
        options: additional compile options.
        shapes: rows and columns of weights for which the speed is predicted.
        height: rows of a program, or 0 if programs do not consist of whole rows.
        trips: iterations of each loop of a program; of a loop over columns, for the first of the shapes.
        reads: how often a program reads its elements.
        written: bytes of codes and scales that the kernel writes per element; None: as many as the weights have.
        width: codes that a thread stores at once at least, where the codes are not of the phase of the weights.
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
    shapes: tuple[tuple[int, int], ...] = ()
    height: int = 0
    trips: int = 1
    reads: int = 1
    written: float | None = 1
    width: int = 8


def specs(dtypes: tuple[str, ...] = tuple(INPUTS)) -> list[Spec]:
    """Return the compilations of every kernel for every input dtype."""
    return [spec for dtype in dtypes for spec in _Dtype(dtype).specs()]


class _Dtype:
    """Compilations for one input dtype."""

    def __init__(self, dtype: str) -> None:
        from ..gpu import amax, blocks, cast, configs, dequant, grouped, groups, rows

        self.kernels = (amax, blocks, cast, dequant, grouped, rows)
        self.groups_kernel = groups.groups_kernel
        self.configs = configs
        self.dtype = dtype
        self.itemsize = 4 if dtype == "float32" else 2
        self.spec = partial(Spec, dtype=dtype)
        self.w, self.q = f"*{INPUTS[dtype]}", "*fp8e4nv"

    def specs(self) -> list[Spec]:
        """Return all compilations."""
        return [
            *self.tensor(),
            *self.rows(),
            *self.blocks(),
            *self.groups(),
            *self.dequant(),
            self.grouped(),
            self.grouped("power-of-two"),
        ]

    def tensor(self) -> list[Spec]:
        """Return the two kernels of one scale per tensor; views at odd offsets and small tensors have own variants."""
        amax, _, cast, *_ = self.kernels
        found = []
        aligned = {"w_ptr": self.w + ":16", "q_ptr": self.q + ":16", "n": "i32:16"}
        odd = {"w_ptr": self.w, "q_ptr": self.q, "n": "i32"}
        for name, policy, tensors, edges, config in (
            ("[evict_first]", "evict_first", aligned, False, self.configs.AMAX),
            ("[evict_last]", "evict_last", aligned, False, self.configs.AMAX),
            ("[odd]", "evict_first", odd, True, self.configs.AMAX),
            ("[1 M]", "evict_first", aligned, False, self.configs.sized(self.configs.AMAX, 1 << 20)),
        ):
            types = {"w_ptr": tensors["w_ptr"], "amax_ptr": "*i32:16", "n": tensors["n"], "phase": "i32"}
            constants = {"TILE": config.tile, "TILES": config.tiles, "POLICY": policy, "PDL": True, "EDGES": edges}
            found.append(
                self.spec(
                    "amax_kernel" + name,
                    kernel=amax.amax_kernel,
                    types=types,
                    constants=constants,
                    warps=config.warps,
                    elements=config.tile * config.tiles,
                    options={"launch_pdl": True},
                    written=0,
                )
            )
        for name, original, tensors, width, config in (
            ("", False, aligned, 8, self.configs.CAST),
            ("[original]", True, aligned, 8, self.configs.CAST),
            ("[odd]", False, odd, 8, self.configs.CAST),
            ("[codes apart]", False, odd, 1, self.configs.CAST),
            ("[1 M]", False, aligned, 8, self.configs.sized(self.configs.CAST, 1 << 20)),
            ("[power-of-two]", False, aligned, 8, self.configs.CAST),
        ):
            rounding = name.strip("[]") if name == "[power-of-two]" else "none"
            edges = tensors is odd
            factor = "*fp32:16" if original else "*i32:16"
            types = tensors | {"amax_ptr": factor, "scale_ptr": "*fp32:16", "phase": "i32"}
            constants = {"TILE": config.tile, "ORIGINAL": original, "REVERSE": True, "PDL": not original}
            found.append(
                self.spec(
                    "cast_kernel" + name,
                    kernel=cast.cast_kernel,
                    types=types,
                    constants=constants | {"EDGES": edges, "WIDTH": width, "ROUNDING": rounding},
                    warps=config.warps,
                    elements=config.tile,
                    casts=2,
                    tail=16 * edges,
                    options={"launch_pdl": not original},
                    shapes=WEIGHTS if name == "" else ((7168, 2048),) if name == "[codes apart]" else (),
                    width=width,
                )
            )
        return found

    def two_d(self, edges: bool) -> dict[str, str]:
        """Return argument types of a two-dimensional tensor."""
        mark = "" if edges else ":16"
        tensors = {"w_ptr": self.w + mark, "q_ptr": self.q + mark, "amax_ptr": "*i32:16", "scale_ptr": "*fp32:16"}
        sizes = {"rows": "i32", "columns": "i32" + mark, "w_stride": "i64" + mark, "q_stride": "i64" + mark}
        return tensors | sizes | {"phase": "i32"}

    def rows(self) -> list[Spec]:
        """Return the rows kernel for the widths of real weights, each plan once, and for ragged widths."""
        plans: dict[Rows, list[tuple[int, int]]] = {}
        for shape in ((8192, 512), *WEIGHTS):
            plans.setdefault(self.configs.rows_plan(shape[1], self.itemsize), []).append(shape)
        found = [self._rows(shapes, plan) for plan, shapes in plans.items()]
        found.append(self._rows([(1024, 147_456)], self.configs.rows_plan(147_456, self.itemsize)))
        found += [self._rows([shape], self.configs.rows_plan(shape[1], self.itemsize), edges=True) for shape in RAGGED]
        for shape in ((7168, 2048), (18432, 73728)):
            plan = self.configs.rows_plan(shape[1], self.itemsize)
            found.append(self._rows([shape], plan, ",codes apart", edges=True, width=1))
        for shape in ((8192, 512), (7168, 2048), (18432, 73728)):
            plan = self.configs.rows_plan(shape[1], self.itemsize)
            found.append(self._rows([shape], plan, ",given", GIVEN=True))
            found.append(self._rows([shape], plan, ",amax", CAST=False))
        shape = (7168, 2048)
        plan = self.configs.rows_plan(shape[1], self.itemsize)
        found.append(self._rows([shape], plan, ",power-of-two", rounding="power-of-two"))
        return found

    def _rows(
        self,
        shapes: list[tuple[int, int]],
        plan: Rows,
        name: str = "",
        edges: bool = False,
        width: int = 8,
        rounding: str = "none",
        **variant: bool,
    ) -> Spec:
        rows = self.kernels[5]
        types = self.two_d(edges)
        constants: dict[str, Any] = {"GIVEN": False, "CAST": True} | variant
        casts = 1 if constants["CAST"] else 0
        if not casts:
            types = {key: value for key, value in types.items() if key not in ("q_ptr", "scale_ptr")}
            constants |= {"q_ptr": None, "scale_ptr": None}
        constants |= {"ROWS": plan.height, "TILE": plan.tile, "PIECES": plan.pieces, "HELD": plan.held}
        return self.spec(
            f"rows_kernel[{'/'.join(dict.fromkeys(str(shape[1]) for shape in shapes))}{name}]",
            kernel=rows.rows_kernel,
            types=types,
            constants=constants | {"EDGES": edges, "WIDTH": width, "ROUNDING": rounding},
            warps=plan.warps,
            elements=plan.height * plan.tile * plan.pieces,
            casts=casts,
            tail=16 * plan.height * edges * casts,
            shapes=() if variant else tuple(shapes),
            height=plan.height,
            trips=1 if plan.held else -(-shapes[0][1] // (plan.tile * plan.pieces)),
            reads=1 if plan.held or variant.get("CAST") is False else 2,
            written=casts,
            width=width,
        )

    def blocks(self) -> list[Spec]:
        """Return the blocks kernel: blocks of 128 x 128, of ragged weights, and larger ones."""
        whole = (shape for shape in WEIGHTS if shape[0] % 128 == shape[1] % 128 == 0)
        shapes = (*whole, (2688, 1856), (10240, 10304))
        return [
            self._blocks("", shapes=shapes),
            self._blocks("[given]", GIVEN=True),
            self._blocks("[original]", GIVEN=True, ORIGINAL=True),
            self._blocks("[amax]", CAST=False),
            self._blocks("[1000/4104/1001]", shapes=RAGGED, edges=True),
            self._blocks("[codes apart]", shapes=((7168, 2048),), edges=True, width=1),
            self._blocks("[128x256]", edges=True, block=(128, 256)),
            self._blocks("[power-of-two]", shapes=ROUNDED, rounding="power-of-two"),
            self._blocks("[power-of-two,given]", rounding="power-of-two", GIVEN=True),
        ]

    def _blocks(
        self,
        name: str,
        shapes: tuple[tuple[int, int], ...] = (),
        edges: bool = False,
        width: int = 8,
        block: tuple[int, int] = (128, 128),
        rounding: str = "none",
        **variant: bool,
    ) -> Spec:
        high, wide, warps = self.configs.block_tile(block, self.itemsize, edges)
        steps = {"across": "i32", "amax_down": "i32", "amax_across": "i32"}
        types = self.two_d(edges) | steps
        constants: dict[str, Any] = {"GIVEN": False, "CAST": True, "ORIGINAL": False} | variant
        if constants["ORIGINAL"]:
            types |= {"amax_ptr": "*fp32:16"}
        casts = 1 if constants["CAST"] else 0
        if not casts:
            types = {key: value for key, value in types.items() if key not in ("q_ptr", "scale_ptr")}
            constants |= {"q_ptr": None, "scale_ptr": None}
        sides = {"B0": block[0], "B1": block[1], "T0": high, "T1": wide}
        return self.spec(
            "blocks_kernel" + name,
            kernel=self.kernels[1].blocks_kernel,
            types=types,
            constants=constants | sides | {"EDGES": edges, "WIDTH": width, "ROUNDING": rounding},
            warps=warps,
            elements=high * wide,
            casts=casts,
            tail=16 * high * edges * casts,
            shapes=shapes,
            trips=-(-block[0] // high) * -(-block[1] // wide),
            reads=1 if (high, wide) == block else 2,
            written=casts,
            width=width,
        )

    def groups(self) -> list[Spec]:
        """Return the groups kernel: blocks of OCP Microscaling, also of a small tensor, and groups of other lengths."""
        return [
            self._groups("[32]", shapes=WEIGHTS),
            self._groups("[32,given]", GIVEN=True),
            self._groups("[32,amax]", CAST=False),
            self._groups("[32,1 M]", count=1 << 20),
            self._groups("[32,none]", rounding="none"),
            self._groups("[16]", group=16),
            self._groups("[256]", group=256),
        ]

    def _groups(
        self,
        name: str,
        shapes: tuple[tuple[int, int], ...] = (),
        group: int = 32,
        count: int = 1 << 30,
        rounding: str = "mx",
        **variant: bool,
    ) -> Spec:
        tile, warps = self.configs.groups_tile(count, self.itemsize)
        types = {"w_ptr": self.w + ":16", "q_ptr": self.q + ":16", "amax_ptr": "*i32:16", "scale_ptr": "*fp32:16"}
        constants: dict[str, Any] = {"GIVEN": False, "CAST": True} | variant
        casts = 1 if constants["CAST"] else 0
        if not casts:
            types = {key: value for key, value in types.items() if key not in ("q_ptr", "scale_ptr")}
            constants |= {"q_ptr": None, "scale_ptr": None}
        return self.spec(
            "groups_kernel" + name,
            kernel=self.groups_kernel,
            types=types | {"groups": "i32"},
            constants=constants | {"GROUPS": tile // group, "GROUP": group, "ROUNDING": rounding},
            warps=warps,
            elements=tile,
            casts=casts,
            shapes=shapes,
            written=casts + 4 / group,
        )

    def dequant(self) -> list[Spec]:
        """Return the two kernels of dequantization."""
        dequant, config = self.kernels[3], self.configs.DEQUANT
        tensors = {"q_ptr": self.q + ":16", "scale_ptr": "*fp32:16", "w_ptr": self.w + ":16"}
        two_d = {"rows": "i32", "columns": "i32:16", "q_stride": "i64:16"}
        steps = {"across": "i32", "scale_down": "i32", "scale_across": "i32"}
        sides = {"B0": 128, "B1": 128, "T0": 32, "T1": config.tile // 32, "LONG": False, "ROW_SCALE": True}
        odd = {"q_ptr": self.q}
        return [
            self.spec(
                f"dequant_{kind}kernel{name}",
                kernel=getattr(dequant, f"dequant_{kind}kernel"),
                types=tensors | more | sizes,
                constants=constants | {"EDGES": bool(more), "WIDTH": width},
                warps=config.warps,
                elements=config.tile,
                shapes=((7168, 2048),) if not more else (),
                written=None,
                width=width,
            )
            for kind, types, constants in (
                ("", {"n": "i32:16"}, {"TILE": config.tile}),
                ("rows_", two_d | steps, sides),
            )
            for name, more, width in (("", {}, 8), ("[ragged]", odd, 8), ("[codes apart]", odd, 1))
            for sizes in [{key: value.removesuffix(":16") if more else value for key, value in types.items()}]
        ]

    def grouped(self, rounding: str = "none") -> Spec:
        """Return the grouped kernel."""
        import triton.language as tl

        config = self.configs.GROUPED
        return self.spec(
            "grouped_kernel" if rounding == "none" else f"grouped_kernel[{rounding}]",
            kernel=self.kernels[4].grouped_kernel,
            types={"tensors_ptr": "*i64:16", "work_ptr": "*i32:16", "tickets": "i32", "ticket_ptr": "*i32:16"}
            | {"found_ptr": "*i32:16", "slots_ptr": "*i32", "scale_ptr": "*fp32:16"},
            constants={
                "DTYPE": getattr(tl, self.dtype),
                "TILE": config.tile,
                "TILES": config.tiles,
                "THREADS": 32 * config.warps,
                "ROUNDING": rounding,
            },
            warps=config.warps,
            elements=config.tile * config.tiles,
            casts=1,
            tail=16,
        )
