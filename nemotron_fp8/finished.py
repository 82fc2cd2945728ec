"""Whether a folder that is to be converted in place has been already."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from nemotron_fp8._filesystem import JOURNAL
from nemotron_fp8.checkpoint.inventory import MARKER, Inventory
from nemotron_fp8.checkpoint.local_files import FileDigest, check_files
from nemotron_fp8.documents.manifest import read_manifest
from nemotron_fp8.errors import SourceError
from nemotron_fp8.inplace import WORKING
from nemotron_fp8.partial import PartialFolder
from nemotron_fp8.sources.folder import read_folder

if TYPE_CHECKING:
    from pathlib import Path

    from nemotron_fp8.planning.recipe import Recipe


def finished_inventory(root: Path, recipe: Recipe) -> Inventory | None:
    """What a folder holds, if it is the complete result of this recipe; None where it is not.

    By its manifest and the sizes of its files, which costs nothing; `verify` compares the digests.
    """
    working = root / WORKING
    if os.path.lexists(root / MARKER) or os.path.lexists(working / JOURNAL):
        return None
    try:
        manifest = read_manifest(root)
        if manifest is None or manifest.recipe != recipe.model_dump(mode="json"):
            return None
        sizes = {name: FileDigest(file.size, None) for name, file in manifest.files.items()}
        if check_files(root, sizes, 1):
            return None
        inventory = replace(read_folder(root), left_out=())
    except SourceError:
        return None
    if working.is_dir() and not working.is_symlink():  # of a run that was stopped while it cleaned up
        partial = PartialFolder(working)
        partial.discard()
        partial.close()
    return inventory
