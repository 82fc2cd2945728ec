"""Masks of credentials: texts that people typed are recorded and shown without what may be a key or a token."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MASK = "..."
_ADDRESS = re.compile(
    r"(?:^|(?<=[\s=,'\"(]))((?:[a-z][a-z0-9+.-]*:/+|(?:s3[an]?|gs|gcs|az|abfss?|wasbs?|https?|hf):))", re.IGNORECASE
)
"""Start of an address; a scheme without slashes is a typing error that people make."""
_PLAIN = re.compile(r"(?:s3|gs|az|hf):/*", re.IGNORECASE)
"""Addresses whose path may hold ``@``: a name in a store, a revision on the Hub."""
_PORT = re.compile(r"[^:@]*(?::\d{1,5})?")
_QUERY = re.compile(r"[?#].*", re.DOTALL)
_TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20,}|(?:AKIA|ASIA)[A-Z0-9]{12,}|gh[pousr]_[A-Za-z0-9]{20,})")
"""Tokens of the Hub and of GitHub, and key ids of AWS."""
_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY|ACCOUNT_KEY|SAS_KEY|PRIVATE_KEY")
_NO_SECRET = re.compile(r"NEMOTRON_FP8_|.*_(?:FILE|PATH|DIR|URL|URI|ENV)$")
SHORTEST = 12
"""Characters of the shortest value of the environment that counts as a secret wherever it appears."""


def masked(text: str) -> str:
    """Return a text without what may be a credential in an address: a user, and a query."""
    found = _ADDRESS.search(text)
    if found is None:
        return _TOKEN.sub(MASK, text)
    head, rest = text[: found.end()], text[found.end() :]
    authority = rest.partition("/")[0]
    plain = _PLAIN.fullmatch(found[1]) is not None
    user, at, after = rest.rpartition("@")
    if at and (not plain or ":" in authority or "@" in authority):
        # A secret may hold slashes, so that the user ends at the last @.
        rest = MASK if _QUERY.search(user) else f"{MASK}@{after}"
    elif (":" in authority) if plain else not _PORT.fullmatch(_QUERY.sub("", authority)):
        rest = MASK
    return _TOKEN.sub(MASK, head + _QUERY.sub(f"?{MASK}", rest))


def masked_words(words: Iterable[str], environment: Mapping[str, str]) -> list[str]:
    """Return the words of a command without what may be credentials.

    Args:
        words: the words.
        environment: variables that are set; the value of one that is named like a secret is masked in every word.
    """
    secrets = {
        value
        for name, value in environment.items()
        if len(value) >= SHORTEST and _SECRET_NAME.search(name) and not _NO_SECRET.match(name)
    }
    found = []
    for word in words:
        shown = word
        for secret in secrets:
            shown = shown.replace(secret, MASK)
        found.append(masked(shown))
    return found


def holds_credentials(text: str) -> bool:
    """Return True if a text is an address with what may be a credential."""
    return masked(text) != text
