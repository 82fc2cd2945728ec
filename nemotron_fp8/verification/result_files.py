"""The files of a result under verification: in a folder here, in a Hub repository in `hub_result_files`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nemotron_fp8._filesystem import names_in
from nemotron_fp8.checkpoint.inventory import MARKER
from nemotron_fp8.checkpoint.local_files import check_files, read_small
from nemotron_fp8.destinations.folder import partial_path
from nemotron_fp8.documents.manifest import read_manifest
from nemotron_fp8.errors import SourceNotFoundError, SourceReadError, UnfinishedError
from nemotron_fp8.progress import ignore_progress
from nemotron_fp8.sources.files import FolderOpener
from nemotron_fp8.sources.folder import read_folder, read_shard_header

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nemotron_fp8.checkpoint.header import Header
    from nemotron_fp8.checkpoint.inventory import Inventory
    from nemotron_fp8.checkpoint.local_files import FileDigest
    from nemotron_fp8.documents.manifest import Manifest
    from nemotron_fp8.hub.options import HubOptions
    from nemotron_fp8.progress import Advance
    from nemotron_fp8.sources.files import Opener


class ResultFiles(Protocol):
    """The files of a result."""

    @property
    def name(self) -> str:
        """What a problem of the result as a whole is said to be about."""

    @property
    def opener(self) -> Opener:
        """Opens its files by name."""

    def names(self) -> list[str]:
        """The names of its files, in order; of what lies in folders nothing is said."""

    def manifest(self) -> Manifest | None:
        """Its manifest; None where there is none.

        Raises:
            MalformedManifestError: it is none, or cannot be read.
        """

    def read(self, name: str) -> bytes:
        """A small file, or one byte more of it than a loader takes.

        Raises:
            SourceError: it cannot be read.
        """

    def header(self, name: str) -> tuple[Header, int]:
        """The header of a shard, and the shard's bytes.

        Raises:
            SourceError: it cannot be read, or breaks the format.
        """

    def inventory(self) -> Inventory:
        """All of it as a checkpoint.

        Raises:
            SourceError: it is none; the class says why.
        """

    def differing(
        self, files: Mapping[str, FileDigest], threads: int, advance: Advance = ignore_progress
    ) -> dict[str, str]:
        """Compare files with what they must be, several at a time; say how the others differ.

        ``advance`` takes the bytes that were read for it.
        """


@dataclass(frozen=True, slots=True)
class FolderFiles:
    """A result in a local folder. See `ResultFiles`."""

    root: Path

    @property
    def name(self) -> str:
        """See `ResultFiles.name`."""
        return self.root.name

    @property
    def opener(self) -> Opener:
        """See `ResultFiles.opener`."""
        return FolderOpener(self.root)

    def names(self) -> list[str]:
        """See `ResultFiles.names`."""
        return names_in(self.root)

    def manifest(self) -> Manifest | None:
        """See `ResultFiles.manifest`."""
        return read_manifest(self.root)

    def read(self, name: str) -> bytes:
        """See `ResultFiles.read`."""
        return read_small(self.root / name)

    def header(self, name: str) -> tuple[Header, int]:
        """See `ResultFiles.header`."""
        return read_shard_header(self.root / name)

    def inventory(self) -> Inventory:
        """See `ResultFiles.inventory`."""
        return read_folder(self.root)

    def differing(
        self, files: Mapping[str, FileDigest], threads: int, advance: Advance = ignore_progress
    ) -> dict[str, str]:
        """See `ResultFiles.differing`: every byte is read."""
        return check_files(self.root, files, threads, links=True, advance=advance)


def open_result(destination: str | os.PathLike[str], hub: HubOptions | None = None) -> ResultFiles:
    """The files of a result.

    Args:
        destination: a folder, or a repository on the Hub: ``hf://owner/name``, ``hf://owner/name@revision``.
        hub: how to read from the Hub; a revision is in the address.

    Raises:
        SourceNotFoundError: there is none.
        UnfinishedError: it is half-way through a conversion in place.
        SourceReadError: the system refuses.
        HubError, AddressError: the Hub does not let it be read; the class says why.
    """
    from nemotron_fp8.hub.address import is_address

    text = os.fspath(destination)
    if not is_address(text):
        return _open_folder(text)
    from nemotron_fp8.hub.options import as_hub_options
    from nemotron_fp8.verification.hub_result_files import open_listed

    return open_listed(text, as_hub_options(hub))


def _open_folder(text: str) -> FolderFiles:
    """A result must be there; say so where it is only being made."""
    from nemotron_fp8.hub.address import may_be_address

    root = Path(text)
    try:
        there, begun = root.is_dir(), partial_path(Path(os.path.realpath(root))).is_dir()
    except OSError as error:  # a name too long, a folder on the way that is closed to us
        raise SourceReadError(text, error.strerror or str(error)) from error
    if there:
        if os.path.lexists(root / MARKER):
            raise UnfinishedError(text)
        return FolderFiles(root)
    if begun:
        raise SourceNotFoundError(text, "unfinished; run the conversion again, it carries on")
    hint = f"a result on the Hub is written hf://{text}" if may_be_address(text) else ""
    raise SourceNotFoundError.absent(root, otherwise=hint)
