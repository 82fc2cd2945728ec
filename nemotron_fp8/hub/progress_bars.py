"""The client's progress bars, put away while a conversion tells of itself."""

from __future__ import annotations

from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


_lock = Lock()
_hidden = 0
"""Conversions of this process that have put the bars away: the last one brings them back."""


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep the client from drawing bars of its own, unless ``HF_HUB_DISABLE_PROGRESS_BARS`` says what to do.

    An upload over Xet draws four lines for each shard, and no parameter of a commit turns them off.
    """
    global _hidden  # noqa: PLW0603  (the switch is one of the process)
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:
        yield
        return
    with _lock:
        ours = _hidden > 0 or not are_progress_bars_disabled()
        _hidden += ours
        if ours and _hidden == 1:
            disable_progress_bars()
    try:
        yield
    finally:
        with _lock:
            _hidden -= ours
            if ours and not _hidden:
                enable_progress_bars()
