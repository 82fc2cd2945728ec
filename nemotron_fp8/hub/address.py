"""Addresses of repositories: ``hf://owner/name`` and ``hf://owner/name@revision``, with or without ``hf://``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nemotron_fp8._secrets import masked
from nemotron_fp8.errors.hub import AddressError

SCHEME = "hf://"
_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_-])?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-/+=]{0,249}")
_ALMOST = re.compile(r"hf:|[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
_PULL_REQUEST = re.compile(r"refs/pr/[0-9]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Address:
    """Address of a repository on the Hub.

    Attributes:
        repo: ``owner/name``.
        revision: branch, tag, commit or ``refs/pr/N``; None for the default branch.
    """

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}" + (f"@{self.revision}" if self.revision else "")


def is_address(text: str) -> bool:
    """Return True if text begins with ``hf://``."""
    return text.startswith(SCHEME)


def may_be_address(text: str) -> bool:
    """Return True if text has the form of an address, ``owner/name`` or ``owner/name@revision``."""
    try:
        parse_address(text)
    except AddressError:
        return False
    return True


def parse_address(text: str) -> Address:
    """Parse an address by the Hub's rules for names.

    Raises:
        AddressError: text is not an address, or would mean something else as part of a URL.
    """
    _refuse_credentials(text)
    rest = text.removeprefix(SCHEME)
    repo, at, revision = rest.partition("@")
    owner, slash, name = repo.partition("/")
    if not slash:
        raise AddressError(text, "an address consists of an owner and a name")
    for part in (owner, name):
        if not _PART.fullmatch(part) or "--" in part or ".." in part:
            raise AddressError(text, f"{part!r} is not a name on the Hub")
    if at and not is_revision(revision):
        raise AddressError(text, f"{revision!r} is not a revision")
    return Address(repo, revision if at else None)


def _refuse_credentials(text: str) -> None:
    """Raise AddressError, without them, for a text that may hold credentials."""
    if (shown := masked(text)) != text:
        raise AddressError(shown, "an address has no user and no query; a token comes from the environment")


def parse_target(text: str) -> Address | None:
    """Parse a destination; return None for a folder.

    Raises:
        AddressError: text looks like an address but is none, such as ``hf:/owner/name`` or a web page's URL, or its
            revision accepts no commits.
    """
    if not is_address(text):
        if _ALMOST.match(text):
            _refuse_credentials(text)
            raise AddressError(text, "neither an address nor a folder; write a folder as ./NAME")
        return None
    address = parse_address(text)
    if address.revision is not None and not is_writable(address.revision):
        raise AddressError(text, f"{address.revision!r} accepts no commits, only a branch or refs/pr/N does")
    return address


def is_writable(revision: str) -> bool:
    """Return True if a revision may accept commits: a branch, by its short name, or a pull request."""
    return is_pull_request(revision) or not (revision.startswith("refs/") or _COMMIT.fullmatch(revision))


def is_pull_request(revision: str) -> bool:
    """Return True if a revision names a pull request, which cannot be created like a branch."""
    return _PULL_REQUEST.fullmatch(revision) is not None


def is_revision(text: str) -> bool:
    """Return True if text can name a branch, tag, commit or pull request by the rules of git."""
    parts = text.split("/")
    return (
        _REVISION.fullmatch(text) is not None
        and ".." not in text
        and all(part and not part.startswith(".") and not part.endswith((".", ".lock")) for part in parts)
    )
