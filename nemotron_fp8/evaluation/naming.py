"""Read a file of figures, find a result in it, and give results short names that differ."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_fp8._utils import short_name, visible
from nemotron_fp8.checkpoint.local_files import read_small
from nemotron_fp8.documents.manifest import shards_digest
from nemotron_fp8.errors import AmbiguousResultError, OtherResultError, StaleFiguresError
from nemotron_fp8.evaluation.result import parse_evaluation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nemotron_fp8.evaluation.figures import CheckpointFigures
    from nemotron_fp8.evaluation.result import Evaluation


SOURCE = "source"
"""Label of the source."""


def read_evaluation(file: str | os.PathLike[str]) -> Evaluation:
    """Return the figures in a file that ``evaluate --json`` wrote.

    Raises:
        SourceReadError: the file cannot be read.
        EvaluationFileError: the file is not such a file.
    """
    return parse_evaluation(read_small(Path(file)), os.fspath(file))


def labels_of(results: Sequence[CheckpointFigures], most: int) -> list[str]:
    """Return a printable label for each result: its short name, or the end of it, which distinguishes results.

    Labels differ from one another and from `SOURCE`: equal ones are numbered.

    Args:
        results: the results.
        most: characters of the longest label.
    """
    names = [visible(short_name(each.name)) for each in results]
    cut = [_end_of(name, most) for name in names]
    count = Counter([SOURCE, *cut])
    if max(count.values()) == 1:
        return cut
    return [f"{number} {_end_of(name, most - len(f'{number} '))}" for number, name in enumerate(names, 1)]


def _end_of(name: str, most: int) -> str:
    return name if len(name) <= most else f"...{name[len(name) - max(most - 3, 1) :]}"


def figures_of_folder(
    evaluation: Evaluation, file: str, folder: str | os.PathLike[str], chosen: str | None = None
) -> CheckpointFigures:
    """Return the figures of the result in a folder, as `find_result` finds them.

    Raises:
        OtherResultError, AmbiguousResultError: as `find_result`.
        StaleFiguresError: the manifest of the folder records other weights than those of the figures.
    """
    root = Path(folder)
    found = find_result(evaluation, file, root.resolve().name, chosen)
    if (digest := shards_digest(root)) and found.digest not in ("", digest):
        raise StaleFiguresError(file, found.name)
    return found


def find_result(evaluation: Evaluation, file: str, folder: str, chosen: str | None = None) -> CheckpointFigures:
    """Return the figures of a result: of the one with its name, or of the chosen one.

    Args:
        evaluation: the figures.
        file: name of the file in messages.
        folder: name of the folder of the result.
        chosen: name of the result in the evaluation, short or whole; None to search for ``folder``.

    Raises:
        OtherResultError: the evaluation is of other results.
        AmbiguousResultError: several results have this name.
    """
    wanted = folder if chosen is None else chosen
    exact = [each for each in evaluation.results if each.name == chosen]
    found = list(dict.fromkeys(exact or [each for each in evaluation.results if short_name(each.name) == wanted]))
    if not found:
        raise OtherResultError(file, wanted, tuple(each.name for each in evaluation.results))
    if len(found) > 1:
        raise AmbiguousResultError(file, wanted, tuple(each.name for each in found))
    return found[0]
