"""Summary of a result for a report, from the result and, if given, its source."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_fp8._display import counted, one_line
from nemotron_fp8._utils import short_name
from nemotron_fp8.checkpoint.inventory import MANIFEST, STATS, is_plain_name
from nemotron_fp8.checkpoint.stated_quantization import last_name
from nemotron_fp8.documents.front_matter import split_card
from nemotron_fp8.documents.stats_json import Figures, parse_figures
from nemotron_fp8.errors.tensors import NoResultError
from nemotron_fp8.hub.address import is_address
from nemotron_fp8.planning.layouts import execution_scales, quantized_dtypes
from nemotron_fp8.planning.layouts.base import Output
from nemotron_fp8.planning.plan import MODULES
from nemotron_fp8.planning.recipe import Recipe, recipe_of
from nemotron_fp8.report.contents import contents_of, recipe_without_patterns
from nemotron_fp8.sources.open import is_remote
from nemotron_fp8.stores.address import is_store, local_path
from nemotron_fp8.untrusted.strict_json import load_value
from nemotron_fp8.verification.result_files import FolderFiles, open_result

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.checkpoint.tensor_view import TensorView
    from nemotron_fp8.planning.receipt import NonFinite
    from nemotron_fp8.progress import Progress
    from nemotron_fp8.report.contents import Contents
    from nemotron_fp8.sources.base import Source
    from nemotron_fp8.sources.files import Opener
    from nemotron_fp8.verification.problems import Problem
    from nemotron_fp8.verification.result_files import ResultFiles


MAX_ROWS, MAX_COLUMNS = 512, 64
"""Layers and projections of a figure; more would be too small to read, and a page of a hundred MB."""
MAX_WORDS = 8
"""Words of a shortened name of a projection."""
MAX_DIGITS = 9
"""Digits of the number of a layer."""
HALF_OCTAVES = 2
"""Bins of the histogram of scales for each factor of two."""
STEP = 1 << 20
"""Elements read at a time."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of the tensors of a result and of its source.

    Attributes:
        source: bytes of the source's shards; None if the manifest does not record them.
        codes: bytes of FP8 weights.
        scales: bytes of their scales.
        unquantized: bytes of all other tensors.
        files: bytes of all files in the manifest; None without a manifest.
    """

    source: int | None
    codes: int
    scales: int
    unquantized: int
    files: int | None

    @property
    def result(self) -> int:
        """Bytes of all tensors of the result."""
        return self.codes + self.scales + self.unquantized


@dataclass(frozen=True, slots=True)
class Scales:
    """Distribution of the scales of a result.

    Attributes:
        count: number of scales.
        smallest, largest: extremes; 0 without scales.
        bins: number of scales in ``[2^(k/2), 2^((k+1)/2))``, by ``k``.
    """

    count: int
    smallest: float
    largest: float
    bins: Mapping[int, int]


@dataclass(frozen=True, slots=True, repr=False)
class ResultSummary:
    """The content of a report on one result.

    Attributes:
        name: name of its folder or repository, without the folders above, the owner and the revision.
        version: version of the library that made it; None without a manifest.
        asked: recipe in the manifest; empty without a manifest.
        layout: recipe that ``quantization_config`` describes; None if it is not one of this library.
        sizes: bytes by kind.
        quantized, unquantized: number of FP8 tensors, and of other tensors without scales.
        stored: number of scales from a calibration: of activations, and of an FP8 cache.
        scales: distribution of the scales of the weights.
        figures: quantization errors; None if they were not measured and no source was given.
        problems: differences from the source; empty without a source.
        checked: the result was compared with its source.
        contents: every tensor, the reasons why some are unquantized, and the engines that read the result.
        source: name of the source, from the call or the model card, without its folder; None if unknown.
        model: architecture, or else type, of the model in its config; None if unknown.
        made: date of the manifest's file, ``YYYY-MM-DD`` (UTC), on which the result was written or copied; None without
            a manifest, and for a result that is not local.
    """

    name: str
    version: str | None
    asked: Mapping[str, Any]
    layout: Recipe | None
    sizes: Sizes
    quantized: int
    unquantized: int
    stored: int
    scales: Scales
    figures: Figures | None
    problems: tuple[Problem, ...] = ()
    checked: bool = False
    contents: Contents | None = None
    source: str | None = None
    model: str | None = None
    made: str | None = None

    def __repr__(self) -> str:
        return one_line("ResultSummary", self.name, self.facts)

    @property
    def facts(self) -> tuple[str, ...]:
        """Tensors, median error and problems as short texts."""
        error = "SQNR not measured"
        if self.figures is not None:
            typical = self.figures.typical
            error = "no error" if typical is None else f"SQNR {typical:.2f} dB in the median"
        problems = (counted(len(self.problems), "problem"),) if self.problems else ()
        return counted(self.quantized, "FP8 tensor"), f"{self.unquantized:,} others", error, *problems

    @property
    def clamped(self) -> int:
        """Values that the clamp to the largest FP8 number changed."""
        return sum(t.clamped for t in self.figures.tensors) if self.figures else 0

    @property
    def flushed(self) -> int:
        """Values other than 0 that became 0."""
        return sum(t.flushed_to_zero for t in self.figures.tensors) if self.figures else 0


def read_summary(
    destination: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    max_memory: str | int = "256MiB",
    threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> ResultSummary:
    """Summarize a result.

    Args:
        destination: the result: a folder, a repository on the Hub (``hf://``) or a folder of an object store.
        source: source of the result, to measure the errors; None to read them from the result, if it has them.
        max_memory: bytes of the working buffers.
        threads: worker threads; None for as many as this process has cores.
        progress: called with the progress of `nemotron_fp8.verify_repo`, which measures the errors.

    Raises:
        SourceError: the result or the source cannot be read.
        HubError, StoreError: the result or the source cannot be fetched.
        RecipeError: ``max_memory`` is malformed.
    """
    files = _files_of(destination)
    root = files.root if isinstance(files, FolderFiles) else None
    inventory = files.inventory()
    manifest = files.manifest()
    quantization = inventory.quantization_config
    layout = recipe_of(quantization)
    views = {view.name: view for view in inventory.views}
    dtypes = quantized_dtypes(quantization)
    weights = [view for view in inventory.views if view.dtype in dtypes]
    if manifest is None and quantization is None and not weights:
        raise NoResultError(os.fspath(destination), len(inventory.views))
    asked = manifest.recipe if manifest else {}
    weight_format = (layout or recipe_without_patterns(None, asked)).weight_format
    wanted = {weight_format.scale_of(view): view.name for view in weights}
    found = {wanted[key]: view for view in inventory.views if (key := Output(*view[:3])) in wanted}
    scales = list(found.values())
    stored = [view for view in inventory.views if last_name(view.name) in execution_scales()]
    codes, scale_bytes = _bytes(weights), _bytes([*scales, *stored])
    sizes = Sizes(
        manifest.source_bytes if manifest else None,
        codes,
        scale_bytes,
        _bytes(inventory.views) - codes - scale_bytes,
        sum(file.size for file in manifest.files.values()) if manifest else None,
    )
    figures: Figures | None = None
    problems: tuple[Problem, ...] = ()
    if source is not None:
        figures, problems = _compare(source, destination, max_memory, threads, progress)
    elif STATS in files.names():
        figures = parse_figures(files.read(STATS))
    spoiled = {each.tensor for each in figures.nonfinite} if figures else ()
    return ResultSummary(
        name=root.resolve().name if root else short_name(files.name),
        version=manifest.version if manifest else None,
        asked=asked,
        layout=layout,
        sizes=sizes,
        quantized=len(weights),
        unquantized=len(views) - len(weights) - len(scales) - len(stored),
        stored=len(stored),
        scales=_distribution(files.opener, scales),
        figures=figures,
        problems=problems,
        checked=source is not None,
        contents=contents_of(inventory, layout, asked, found, stored, spoiled, _missing_folders(files, inventory)),
        source=_name_of_source(source, inventory.card),
        model=_model_of(inventory.config or {}),
        made=_date_of(root / MANIFEST) if root and manifest else None,
    )


def _files_of(destination: str | os.PathLike[str]) -> ResultFiles:
    """Return the files of a result; of a folder without asking whether a conversion of it is unfinished."""
    text = os.fspath(destination)
    text = local_path(text) or text
    return open_result(text) if is_address(text) or is_store(text) else FolderFiles(Path(text))


def _name_of_source(source: str | os.PathLike[str] | None, card: bytes | None) -> str | None:
    """Return the name of the source, without its folder: as it was passed, else as a model card states it."""
    if source is not None:
        text = os.fspath(source)
        return short_name(text if is_store(text) or is_remote(text) else str(Path(local_path(text) or text).resolve()))
    named = split_card(card or b"")[0].get("base_model")
    return named if isinstance(named, str) else None


def _model_of(config: Mapping[str, Any]) -> str | None:
    """Return the architecture, or else the type, of a model."""
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else config.get("model_type")
    return first if isinstance(first, str) else None


def _date_of(file: Path) -> str | None:
    """Return the date of a file's last change, ``YYYY-MM-DD`` (UTC); None if it has none that a calendar knows."""
    with suppress(OSError, OverflowError, ValueError):
        return datetime.fromtimestamp(file.stat().st_mtime, timezone.utc).date().isoformat()
    return None


def _missing_folders(files: ResultFiles, inventory: Inventory) -> tuple[str, ...]:
    """Return the folders that modules.json of Sentence Transformers names and a result lacks."""
    if not any(side.name == MODULES for side in inventory.side_files):
        return ()
    listed: object = []
    with suppress(_MalformedError):
        listed = load_value(files.read(MODULES), MODULES, _MalformedError)
    paths = [each.get("path") for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    named = [path for path in paths if isinstance(path, str) and is_plain_name(path)]
    if isinstance(files, FolderFiles):
        return tuple(path for path in named if not (files.root / path).is_dir())
    there = {path.partition("/")[0] for path in files.paths() if "/" in path}
    return tuple(path for path in named if path not in there)


class _MalformedError(Exception):
    """A file is not JSON."""


def _bytes(views: Iterable[TensorView]) -> int:
    return sum(view.nbytes for view in views)


def _compare(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    max_memory: str | int,
    threads: int | None,
    progress: Callable[[Progress], None] | None,
) -> tuple[Figures, tuple[Problem, ...]]:
    from nemotron_fp8.sources.open import open_source
    from nemotron_fp8.verification.verify import verify_repo

    verification = verify_repo(source, destination, max_memory, threads, progress=progress)
    measured = {tensor.name for tensor in verification.tensors}
    found = _nonfinite(open_source(source), measured)
    return Figures(verification.tensors, found), verification.problems


def _nonfinite(source: Source, quantized: set[str]) -> tuple[NonFinite, ...]:
    """Find NaN and Inf in the weights that this library could quantize and that are unquantized.

    Patterns of a recipe are not asked: that of a result is untrusted text, and a regular expression can run for years.
    """
    from nemotron_fp8.planning.families import family_of
    from nemotron_fp8.planning.quantize import decide_all

    inventory, decisions, _ = decide_all(source.inventory, Recipe(), family_of(source.inventory.config))
    unquantized = [view for view in inventory.views if decisions[view.name].quantize and view.name not in quantized]
    return tuple(found for view in unquantized if (found := _count(source, view)))


def _count(source: Source, view: TensorView) -> NonFinite | None:
    from nemotron_fp8.engines.nonfinite import count_all
    from nemotron_fp8.sources.reader import Reader

    with Reader(source.opener) as reader:
        return count_all(view, reader)


def _distribution(opener: Opener, scales: list[TensorView]) -> Scales:
    import torch

    from nemotron_fp8.sources.reader import Reader
    from nemotron_fp8.sources.scale_values import unpack_scales

    bins: defaultdict[int, int] = defaultdict(int)
    smallest, largest, count = float("inf"), 0.0, 0
    with Reader(opener) as reader:
        for view in scales:
            for begin in range(0, view.numel, STEP):
                with reader.elements(view, begin, min(begin + STEP, view.numel)) as stored:
                    values = unpack_scales(stored, view.dtype)
                    known = values[torch.isfinite(values) & (values > 0)].double()
                    del stored, values
                if not known.numel():
                    continue
                count += known.numel()
                smallest, largest = min(smallest, float(known.min())), max(largest, float(known.max()))
                places = torch.floor(torch.log2(known) * HALF_OCTAVES).long()
                low = int(places.min())
                for place, many in enumerate(torch.bincount(places - low).tolist(), low):
                    if many:
                        bins[place] += many
    return Scales(count, smallest if count else 0.0, largest, dict(sorted(bins.items())))


@dataclass(slots=True)
class Grid:
    """SQNR of weights by layer and projection; the worst of several weights in one place (experts).

    Attributes:
        rows: labels of the layers, in order.
        columns: labels of the projections, in order of appearance.
        cells: SQNR in dB by row and column; NaN for a weight without signal.
        names: weight of each cell.
    """

    rows: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    cells: dict[tuple[int, int], float] = field(default_factory=dict)
    names: dict[tuple[int, int], str] = field(default_factory=dict)


def grid_of(figures: Figures) -> Grid:
    """Arrange figures by layer and projection; of very many, the first `MAX_ROWS` and `MAX_COLUMNS`."""
    placed = [(t, *_place(t.name)) for t in figures.tensors]
    stems = {stem for _, stem, layer, _ in placed if layer >= 0}
    shorts = dict(islice(_shorten(dict.fromkeys(rest for *_, rest in placed)).items(), MAX_COLUMNS))
    keys = sorted({(stem, layer) for _, stem, layer, _ in placed})[:MAX_ROWS]
    rows = ["other" if layer < 0 else str(layer) if len(stems) == 1 else f"{stem}{layer}" for stem, layer in keys]
    grid = Grid(rows, list(shorts.values()))
    row_of, column_of = {key: i for i, key in enumerate(keys)}, {rest: i for i, rest in enumerate(shorts)}
    for tensor, stem, layer, rest in placed:
        if (stem, layer) not in row_of or rest not in column_of:
            continue
        place = row_of[stem, layer], column_of[rest]
        if place not in grid.cells or tensor.sqnr_db < grid.cells[place]:
            grid.cells[place], grid.names[place] = tensor.sqnr_db, tensor.name
    return grid


def _place(name: str) -> tuple[str, int, str]:
    """Return stem, layer and projection of a weight; layer -1 for a weight outside of layers.

    The first number in a name is its layer; later numbers are experts.
    """
    words = name.split(".")
    number = next((i for i, word in enumerate(words[:-2]) if _is_number(word)), None)
    if number is None or words[-1] != "weight":
        return "", -1, name.removesuffix(".weight")
    stem, rest = words[:number], words[number + 1 : -1]
    inner = ["*" if _is_number(word) else word for word in rest[1:-1]]
    return ".".join([*stem, ""]), int(words[number]), ".".join([*rest[:1], *inner, *rest[1:][-1:]])


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdecimal() and len(word) <= MAX_DIGITS


def _shorten(names: Iterable[str]) -> dict[str, str]:
    """Shorten names of projections to the fewest last words that distinguish them, up to `MAX_WORDS`."""
    ends = {name: list(_ends(name)) for name in names}
    count = Counter(end for each in ends.values() for end in each)
    return {name: next((end for end in each if count[end] == 1), name) for name, each in ends.items()}


def _ends(name: str) -> Iterator[str]:
    """Yield the ends of a name, from its last word on."""
    at = len(name)
    for _ in range(MAX_WORDS):
        at = name.rfind(".", 0, at)
        if at < 0:
            yield name
            return
        yield name[at + 1 :]
