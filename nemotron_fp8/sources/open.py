"""Open a source by its name: take its inventory and create its opener."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_fp8._utils import refuse_credentials
from nemotron_fp8.checkpoint.inventory import CONFIG, assemble, is_adapter, make_shard, without_remnants
from nemotron_fp8.errors import RecipeError, SourceNotFoundError, SourceReadError
from nemotron_fp8.sources.base import Source, local_stamps, parse_shard_size, refuse_shard_size
from nemotron_fp8.sources.folder import (
    inspect_path,
    read_folder,
    read_shard_header,
    refuse_one_of_several,
    refuse_pointer_file,
    wrong_file,
)
from nemotron_fp8.stores.address import is_store, local_path

if TYPE_CHECKING:
    from nemotron_fp8.checkpoint.inventory import Shard
    from nemotron_fp8.hub.options import HubOptions


PLAIN_SECONDS = 30.0
"""Seconds without progress after which a name without ``hf://`` fails: it may be a mistyped folder."""
PLAIN_CONNECTS = 1
"""Failed connections that are retried for such a name: there may be no network."""


def open_source(
    source: str | os.PathLike[str], shard_size: str | int | None = None, hub: HubOptions | None = None
) -> Source:
    """Take the inventory of a source and create its opener. No tensor is read.

    Args:
        source: a checkpoint folder, a ``.safetensors`` file, a NeMo checkpoint's folder, a ``.nemo`` archive, or a
            repository on the Hub: ``hf://owner/name`` or ``hf://owner/name@revision``, also without ``hf://`` if
            no such folder exists; or a folder of an object store: ``s3://``, ``gs://`` or ``az://``.
        shard_size: bytes of tensors in a shard, as a number or like ``"5GB"``, for a NeMo checkpoint; a
            checkpoint of safetensors shards has its own.
        hub: options for reading from the Hub.

    Raises:
        SourceError: the checkpoint cannot be read; the class names the reason.
        HubError, AddressError: the Hub rejects a request, or the address is malformed.
        StoreError, StoreAddressError: the same of an object store.
        RecipeError: ``shard_size`` is malformed, or set for a source that has shards; or a revision is set for a
            source that is not on the Hub.
    """
    from nemotron_fp8.hub.options import as_hub_options
    from nemotron_fp8.sources.files import FolderOpener, identify
    from nemotron_fp8.sources.nemo.inventory import is_nemo, open_nemo

    options = as_hub_options(hub)
    text = os.fspath(source)
    refuse_credentials(text)
    text = local_path(text) or text
    if is_store(text):
        from nemotron_fp8.sources.store import open_store

        _refuse_revision(options)
        return open_store(text, shard_size, options.on_wait, options.retry_policy())
    root = Path(text)
    try:
        root.exists()
    except OSError as error:  # a name too long, a folder without permission
        raise SourceReadError(text, error.strerror or str(error)) from error
    remote = is_remote(text)
    if not remote and root.is_file():
        refuse_pointer_file(root)
    if not remote:
        _refuse_revision(options)
    if not remote and is_nemo(root):
        return open_nemo(root, parse_shard_size(shard_size))
    if remote:
        return _open_repo(text, shard_size, options)
    refuse_shard_size(shard_size)
    if root.is_file():
        return _open_file(root)
    # Before the inventory, so that every later change is detected when a file is read.
    identities = identify(root) if root.is_dir() else {}
    inventory = without_remnants(read_folder(root))
    return Source(inventory, FolderOpener(root, identities), root, local_stamps(inventory, identities))


def _refuse_revision(options: HubOptions) -> None:
    if options.revision is not None:
        raise RecipeError(
            "revision (--revision) applies to a source on the Hub only; write the branch of a destination into its"
            " address: hf://owner/name@BRANCH"
        )


def is_remote(text: str) -> bool:
    """Return True for a repository on the Hub: ``hf://owner/name``, or ``owner/name`` if no such path exists."""
    from nemotron_fp8.hub.address import is_address, may_be_address

    return is_address(text) or (may_be_address(text) and not os.path.lexists(text))


def shards_of(path: str, hub: HubOptions | None = None) -> tuple[Shard, ...]:
    """Return the shards of a folder, a repository or a store, or the single shard of a file, from headers alone.

    Raises:
        SourceError, HubError, StoreError: as `open_source` and `nemotron_fp8.sources.folder.inspect_path`.
    """
    path = local_path(path) or path
    if is_store(path):
        from nemotron_fp8.hub.options import as_hub_options
        from nemotron_fp8.sources.store import inspect_store

        options = as_hub_options(hub)
        return inspect_store(path, options.on_wait, options.retry_policy())
    return open_source(path, hub=hub).inventory.shards if is_remote(path) else inspect_path(path)


def _open_file(path: Path) -> Source:
    """Open a single shard; with the config and the other files beside it, if its folder has a config.

    Raises:
        SourceError: the file is no shard, or one of several shards; the class names the reason.
    """
    from nemotron_fp8.sources.files import FolderOpener, identify

    if path.suffix != ".safetensors" or is_adapter(path.name):
        raise wrong_file(path)
    folder = path.parent
    identities = identify(folder)
    if (folder / CONFIG).is_file():
        inventory = replace(read_folder(folder, path.name), source=str(path))
    else:
        refuse_one_of_several(folder, path.name, None)
        shard = make_shard(path.name, *read_shard_header(path))
        inventory = assemble(str(path), (shard,), None, None, None, (), ())
    return Source(
        without_remnants(inventory), FolderOpener(folder, identities), path, local_stamps(inventory, identities)
    )


def _open_repo(text: str, shard_size: str | int | None, options: HubOptions) -> Source:
    """Open a repository on the Hub; retry only briefly without ``hf://``, which may be a mistyped folder."""
    from nemotron_fp8.errors.hub import MissingRepoError, NoProgressError, OfflineError, UnreachableError
    from nemotron_fp8.hub.address import is_address, parse_address
    from nemotron_fp8.sources.hub import HubOpener, HubSource, read_repo
    from nemotron_fp8.sources.hub_prefetch import HubPrefetcher
    from nemotron_fp8.sources.nemo.remote import is_nemo_listing, read_nemo_listing

    address = parse_address(text)
    if options.revision is not None:
        if address.revision not in (None, options.revision):
            raise RecipeError(
                f"revision (--revision) is {options.revision!r}, but the address is {address}; pass one of the two"
            )
        address = parse_address(f"{address.repo}@{options.revision}")
    client = options.client()
    policy = client.policy
    if not is_address(text):
        policy = replace(policy, seconds=min(PLAIN_SECONDS, policy.seconds), max_connects=PLAIN_CONNECTS)
    try:
        listing = client.with_options(policy=policy).listing(address.repo, address.revision)
    except (MissingRepoError, NoProgressError, OfflineError, UnreachableError) as error:
        if is_address(text):
            raise
        raise SourceNotFoundError(text, f"no such folder; as a repository on the Hub: {error}") from None
    opener = HubOpener(client, listing)
    if is_nemo_listing(listing.files):
        size = parse_shard_size(shard_size)
        with listing.naming():
            nemo = read_nemo_listing(client, listing, str(address), size, opener)
        prefetcher = HubPrefetcher(HubSource(nemo.inventory, listing, {}), opener, options.folder())
        return replace(nemo, prefetcher=prefetcher, address=f"hf://{address.repo}@{listing.sha}")
    refuse_shard_size(shard_size)
    with listing.naming():
        found = read_repo(client, address, listing)
        found = replace(found, inventory=without_remnants(found.inventory))
    prefetcher = HubPrefetcher(found, opener, options.folder())
    return Source(found.inventory, opener, None, found.stamps, prefetcher, f"hf://{address.repo}@{listing.sha}")
