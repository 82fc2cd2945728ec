"""Error of a release."""

from __future__ import annotations


class ReleaseError(Exception):
    """A release cannot be made; the message states the reason and the remedy."""
