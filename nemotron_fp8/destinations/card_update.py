"""Add a section to the model card of a finished result, and record the new card in its manifest.

Two files change, each by a rename. In between the manifest records the card without its section: whatever a kill leaves
behind, the card is the recorded one, or it is without its section. The next call starts from there.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

from nemotron_fp8._filesystem import as_write_error, sync_folder
from nemotron_fp8.checkpoint.inventory import CARD, MANIFEST, MARKER
from nemotron_fp8.checkpoint.local_files import FileDigest, read_small
from nemotron_fp8.destinations.file_sink import write_file
from nemotron_fp8.destinations.folder import partial_path
from nemotron_fp8.destinations.partial_folder import PartialFolder
from nemotron_fp8.documents.evaluation_section import split_evaluation, with_card, with_evaluation
from nemotron_fp8.documents.manifest import parse_manifest
from nemotron_fp8.errors import CardError, SourceNotFoundError, UnfinishedError

if TYPE_CHECKING:
    from pathlib import Path


def update_card(root: Path, lines: list[str] | None) -> bool:
    """Replace the section of a card, or remove it.

    Args:
        root: folder of the result.
        lines: lines of the section; None to remove it.

    Returns:
        True if a file has changed.

    Raises:
        SourceNotFoundError, UnfinishedError: there is no finished result.
        SourceReadError, MalformedManifestError: a file cannot be read, or the manifest is damaged.
        CardError: the card is not the recorded one, or is not one of this library.
        DestinationBusyError: another process is writing the result.
        WriteError: a file cannot be written.
    """
    path = root.resolve()
    if not path.is_dir():
        raise SourceNotFoundError.absent(root)
    if os.path.lexists(path / MARKER):
        raise UnfinishedError(str(root))
    partial = PartialFolder(partial_path(path))
    try:
        return _Update(path, partial).run(lines)
    finally:
        partial.discard_work()
        partial.discard_unused()
        partial.close()


class _Update:
    """Change of a card, while the result is locked."""

    def __init__(self, root: Path, partial: PartialFolder) -> None:
        self._root, self._partial = root, partial
        self._card, self._manifest = self._read(CARD), self._read(MANIFEST)
        self._recorded = parse_manifest(self._manifest).files.get(CARD)
        if self._recorded is None:
            raise CardError(str(root / MANIFEST), f"records no {CARD}; quantize again for a result with a card")

    def _read(self, name: str) -> bytes:
        path = self._root / name
        if path.is_symlink():
            raise CardError(str(path), "a link, as in a Hub cache; copy the result to another folder first")
        if not path.exists():
            raise CardError(str(path), "missing; a result of this library has it, so restore it or quantize again")
        return read_small(path)

    def run(self, lines: list[str] | None) -> bool:
        plain, _ = split_evaluation(self._card)
        if not (self._is_recorded(self._card) or self._is_recorded(plain)):
            problem = f"was changed after the conversion, so that {MANIFEST} does not record it; restore it first"
            raise CardError(str(self._root / CARD), problem)
        card = plain if lines is None else with_evaluation(plain, lines)
        if card is None:
            raise CardError(str(self._root / CARD), "without the marks of nemotron_fp8 around its text; restore them")
        if card == self._card and self._is_recorded(card):
            return False
        self._partial.begin()
        with as_write_error(self._root):
            if not self._is_recorded(plain):
                self._write(MANIFEST, with_card(self._manifest, plain))
            self._write(CARD, card)
            self._write(MANIFEST, with_card(self._manifest, card))
        return True

    def _is_recorded(self, card: bytes) -> bool:
        assert self._recorded is not None  # checked at the start
        found = FileDigest(len(card), hashlib.sha256(card).hexdigest())
        return found.size == self._recorded.size and self._recorded.sha256 in (None, found.sha256)

    def _write(self, name: str, data: bytes) -> None:
        write_file(self._root / name, iter([data]), self._partial.work / name)
        sync_folder(self._root)
