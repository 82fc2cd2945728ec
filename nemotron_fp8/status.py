"""State of a conversion, an evaluation or a calibration, whoever runs it: `status_of`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_fp8._utils import check_arguments
from nemotron_fp8.destinations.folder_status import folder_status
from nemotron_fp8.destinations.status import Status
from nemotron_fp8.hub.address import parse_target
from nemotron_fp8.inference.state_file import is_state, saved_status
from nemotron_fp8.stores.address import is_store, local_path, parse_store

if TYPE_CHECKING:
    from nemotron_fp8.hub.options import HubOptions

__all__ = ["Status", "status_of"]


def status_of(destination: str | os.PathLike[str], hub: HubOptions | None = None) -> Status:
    """Return the state of a destination: what is done, how fast, what is left, and by which process.

    Nothing is locked, written or created, so that a running conversion is not disturbed.

    Args:
        destination: the destination of a conversion as in `quantize_repo`, the folder of a conversion in place, or the
            folder of a saved state of an evaluation or a calibration (``state_dir``).
        hub: options for reading from the Hub.

    Returns:
        The state. An absent destination has the state ``none``.

    Raises:
        DamagedJournalError: the journal of an unfinished conversion is damaged.
        MalformedManifestError: the manifest of the result is damaged.
        EvaluationStateError: the saved state is damaged.
        SourceReadError, OSError: a file cannot be read.
        HubError, AddressError: the Hub rejects a request or cannot be reached, or the address is malformed.
        StoreError, StoreAddressError: the same of an object store.
    """
    check_arguments(destination=destination)
    named = os.fspath(destination)
    if is_store(named):
        from nemotron_fp8.destinations.store.status import store_status
        from nemotron_fp8.hub.options import as_hub_options
        from nemotron_fp8.stores.client import StoreClient
        from nemotron_fp8.stores.connection import require_obstore

        address = parse_store(named)
        require_obstore()
        options = as_hub_options(hub)
        return store_status(StoreClient(address, options.retry_policy(), on_wait=options.on_wait), named)
    named = local_path(named) or named
    repo = parse_target(named)
    if repo is not None:
        from nemotron_fp8.destinations.hub.status import hub_status
        from nemotron_fp8.hub.options import as_hub_options

        return hub_status(as_hub_options(hub).client(), repo, named)
    if is_state(Path(named)):
        return saved_status(Path(named), named)
    return folder_status(Path(named), named)
