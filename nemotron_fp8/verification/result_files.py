"""Files of a result under verification: in a folder, a repository (`hub_result_files`) or a store."""

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
from nemotron_fp8.sources.folder import read_folder, read_shard_header, refuse_working
from nemotron_fp8.stores.address import is_store, local_path

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
    """Files of a result."""

    @property
    def name(self) -> str:
        """Name of the result in problems."""

    @property
    def opener(self) -> Opener:
        """Opener of the files, by name."""

    def names(self) -> list[str]:
        """Return the names of the files, in order, without those in subfolders."""

    def paths(self) -> list[str]:
        """Return the paths of all files, in order, with ``/`` between folders; also what is no regular file.

        Raises:
            SourceReadError: there are more than `MAX_PATHS`.
        """

    def manifest(self) -> Manifest | None:
        """Return the manifest; None without one.

        Raises:
            MalformedManifestError: the manifest is malformed, or cannot be read.
        """

    def read(self, name: str) -> bytes:
        """Return a small file, truncated one byte beyond the size limit of parsers, so that they reject it.

        Raises:
            SourceError: the file cannot be read.
        """

    def header(self, name: str) -> tuple[Header, int]:
        """Return the header of a shard, and the bytes of the shard.

        Raises:
            SourceError: the shard cannot be read, or breaks the format.
        """

    def inventory(self) -> Inventory:
        """Return the inventory of the result as a checkpoint.

        Raises:
            SourceError: the result is no checkpoint; the class names the reason.
        """

    def differing(
        self, files: Mapping[str, FileDigest], threads: int, advance: Advance = ignore_progress
    ) -> dict[str, str]:
        """Compare files with their expected digests, several at a time; return the differences by name.

        ``advance`` is called with the bytes read.
        """


MAX_PATHS = 20_000
"""Most files and folders of a result; a folder of another kind, such as ``/``, has more."""
OF_TOOLS = frozenset((".git", ".cache"))
"""Folders of git and of downloads, from which no engine loads a file."""


@dataclass(frozen=True, slots=True)
class FolderFiles:
    """Result in a local folder."""

    root: Path

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def opener(self) -> Opener:
        return FolderOpener(self.root)

    def names(self) -> list[str]:
        return names_in(self.root)

    def paths(self) -> list[str]:
        found: list[str] = []
        pending = [("", self.root)]
        while pending:
            stem, folder = pending.pop()
            try:
                for entry in os.scandir(folder):
                    path = stem + entry.name
                    if not entry.is_dir(follow_symlinks=False):
                        found.append(path)
                    elif path not in OF_TOOLS:
                        pending.append((f"{path}/", Path(entry.path)))
            except OSError:
                found.append(stem.removesuffix("/"))  # a folder that cannot be read may hold anything
            if len(found) + len(pending) > MAX_PATHS:
                raise SourceReadError(str(self.root), f"more than {MAX_PATHS:,} files and folders; is it a result?")
        return sorted(found)

    def manifest(self) -> Manifest | None:
        return read_manifest(self.root)

    def read(self, name: str) -> bytes:
        return read_small(self.root / name)

    def header(self, name: str) -> tuple[Header, int]:
        return read_shard_header(self.root / name)

    def inventory(self) -> Inventory:
        return read_folder(self.root)

    def differing(
        self, files: Mapping[str, FileDigest], threads: int, advance: Advance = ignore_progress
    ) -> dict[str, str]:
        return check_files(self.root, files, threads, links=True, advance=advance)


def open_result(destination: str | os.PathLike[str], hub: HubOptions | None = None) -> ResultFiles:
    """Open the files of a result.

    Args:
        destination: a folder; a repository on the Hub, ``hf://owner/name`` or ``hf://owner/name@revision``; or a folder
            of an object store, ``s3://bucket/folder``, ``gs://bucket/folder`` or ``az://container/folder``.
        hub: options for reading from the Hub; a revision is part of the address.

    Raises:
        SourceNotFoundError: the result does not exist.
        UnfinishedError: an in-place conversion of the folder is unfinished.
        SourceReadError: the folder cannot be read.
        HubError, AddressError: the Hub rejects a request, or the address is malformed.
        StoreError, StoreAddressError: the store rejects a request, or the address is malformed.
    """
    from nemotron_fp8.hub.address import is_address
    from nemotron_fp8.hub.options import as_hub_options

    text = os.fspath(destination)
    if is_store(text):
        from nemotron_fp8.verification.store_result_files import open_in_store

        return open_in_store(text, as_hub_options(hub))
    if not is_address(text):
        return _open_folder(local_path(text) or text)
    from nemotron_fp8.verification.hub_result_files import open_listed

    return open_listed(text, as_hub_options(hub))


def _open_folder(text: str) -> FolderFiles:
    """Open a local folder; reject an unfinished conversion by its own error."""
    from nemotron_fp8.hub.address import may_be_address

    root = Path(text)
    try:
        there, begun = root.is_dir(), partial_path(Path(os.path.realpath(root))).is_dir()
    except OSError as error:  # a name too long, a folder without permission
        raise SourceReadError(text, error.strerror or str(error)) from error
    if there:
        if os.path.lexists(root / MARKER):
            raise UnfinishedError(text)
        refuse_working(root)
        return FolderFiles(root)
    if begun:
        raise SourceNotFoundError(text, "unfinished; rerun the conversion to resume it")
    hint = f"for a result on the Hub, pass hf://{text}" if may_be_address(text) else ""
    raise SourceNotFoundError.absent(root, otherwise=hint)
