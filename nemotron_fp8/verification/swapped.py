"""Source and destination of a verification that were named in the wrong order."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from nemotron_fp8._utils import plain_path, shell_word
from nemotron_fp8.errors import NemotronFp8Error, RecipeError
from nemotron_fp8.verification.result_files import open_result

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nemotron_fp8.hub.options import HubOptions
    from nemotron_fp8.verification.problems import Problem
    from nemotron_fp8.verification.result_files import ResultFiles


def refuse_swapped(
    source: str | os.PathLike[str], destination: str | os.PathLike[str], problems: Sequence[Problem], hub: HubOptions
) -> None:
    """Raise if a result does not match its source because they were named in the wrong order.

    They were if the manifest of the source records shards of as many bytes as those of the destination, and the
    destination has no manifest that says the same of the source. A destination that matches is never asked: a
    dequantized checkpoint may be as large as the original.

    Args:
        source: source of the verification.
        destination: result under verification.
        problems: problems that were found.
        hub: options for reading from the Hub.

    Raises:
        RecipeError: source and destination are swapped.
    """
    result, original = os.fspath(source), os.fspath(destination)
    try:
        there = open_result(original, hub)
        if hub.revision is not None:
            result, hub = f"{result}@{hub.revision}", replace(hub, revision=None)
        mine = open_result(result, hub)
        swapped = _is_made_from(mine, there) and not _is_made_from(there, mine)
    except (NemotronFp8Error, OSError):  # one of them cannot be read as a result, which the problems say
        return
    if swapped:
        count = f"{len(problems):,} problem{'s' * (len(problems) != 1)}, the first {problems[0].tensor}:"
        raise RecipeError(
            f"are source and destination swapped? The manifest of {result} says that it was made from a checkpoint of"
            f" the size of {original}, which does not match it ({count} {problems[0].problem}); the other order is"
            f" nemotron-fp8 verify {_argument(original)} {_argument(result)}",
            ("source", "destination"),
        )


def _argument(name: str) -> str:
    return shell_word(plain_path(name))


def _is_made_from(result: ResultFiles, other: ResultFiles) -> bool:
    """Return True if the manifest of a result records source shards of as many bytes as another folder has."""
    manifest = result.manifest()
    if manifest is None or manifest.source_bytes is None:
        return False
    shards = [name for name in other.names() if name.endswith(".safetensors")]
    return bool(shards) and manifest.source_bytes == sum(other.header(name)[1] for name in shards)
