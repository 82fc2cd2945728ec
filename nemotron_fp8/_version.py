"""Version of both packages, and their repository. Builds and released texts read them here."""

from __future__ import annotations

__version__ = "0.1.0.dev0"
"""Version. Between releases it ends in ``.devN``: such a version is on no package index."""

REPOSITORY = ""
"""Address of the public repository; empty while there is none."""

RELEASED = "dev" not in __version__ and "+" not in __version__
"""True if people can install this version by its number: a commit with such a version is tagged and published."""
