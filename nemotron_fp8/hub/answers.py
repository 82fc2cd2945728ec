"""Answers of the Hub's JSON API as checked records. Other keys of an answer are ignored.

Source of the endpoints and their keys: the OpenAPI description of the Hub, and ``HfApi`` of huggingface_hub.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from nemotron_fp8.errors import printable
from nemotron_fp8.hub.failures import MalformedAnswerError
from nemotron_fp8.untrusted import strict_json
from nemotron_fp8.untrusted.guard import guarded

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
MAX_VALUES = 1_000_000
"""Most values of an answer: a listing of 100,000 files has 800,000."""


Commit = Annotated[str, StringConstraints(pattern=r"\A[0-9a-f]{40}\z")]
Sha256 = Annotated[str, StringConstraints(pattern=r"\A[0-9a-f]{64}\z")]
Size = Annotated[int, Field(ge=0, lt=1 << 60)]
Path = Annotated[str, StringConstraints(max_length=4096)]
"""A path as the server names it. Only plain names (`is_plain_name`) are ever requested."""
Text = Annotated[str, StringConstraints(max_length=1_000_000)]


class _Answer(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, hide_input_in_errors=True)


class LfsObject(_Answer):
    """An object that is stored outside of git, in a listing."""

    sha256: Sha256
    size: Size


class ListedFile(_Answer):
    """A file of ``GET /api/models/{repo}/revision/{revision}?blobs=true``."""

    rfilename: Path
    size: Size
    blob: Commit | None = Field(default=None, alias="blobId")
    lfs: LfsObject | None = None


class ModelInfo(_Answer):
    """``GET /api/models/{repo}/revision/{revision}?blobs=true``."""

    sha: Commit
    siblings: list[ListedFile]
    private: bool = False
    gated: bool | Literal["auto", "manual"] = False


class HistoryItem(_Answer):
    """A commit of ``GET /api/models/{repo}/commits/{revision}``, which answers a list."""

    id: Commit
    title: Text
    message: Text | None = None
    date: Text | None = None


class Ref(_Answer):
    """A branch, tag or pull request."""

    name: Text
    ref: Text


class PullRequestRef(_Answer):
    """The branch of a pull request."""

    ref: Annotated[str, StringConstraints(pattern=r"\Arefs/pr/[0-9]{1,9}\z")]


class Refs(_Answer):
    """``GET /api/models/{repo}/refs``."""

    branches: list[Ref] = []
    tags: list[Ref] = []
    pull_requests: list[PullRequestRef] | None = Field(default=None, alias="pullRequests")


class StoredObject(_Answer):
    """An object that is stored outside of git, by its path."""

    oid: Sha256
    size: Size


class PathInfo(_Answer):
    """A file or folder of ``POST /api/models/{repo}/paths-info/{revision}``, which answers a list."""

    path: Path
    lfs: StoredObject | None = None


class CardFault(_Answer):
    """A fault of a front matter."""

    message: Text


class CardFaults(_Answer):
    """``POST /api/validate-yaml`` with status 400."""

    errors: list[CardFault]


_HALVES = re.compile("[\ud800-\udfff]")


def _encodable(value: Any) -> Any:
    """Replace every half of a surrogate pair by NUL, which no text and no plain name has; pydantic rejects halves."""
    if isinstance(value, str):
        return _HALVES.sub("\0", value)
    if isinstance(value, list):
        return [_encodable(item) for item in value]
    return {key: _encodable(item) for key, item in value.items()} if isinstance(value, dict) else value


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def parse(kind: type[T], data: bytes) -> T:
    """Parse the body of an answer.

    Args:
        kind: a class of this module, or a list of one.
        data: the body.

    Raises:
        MalformedAnswerError: the body is not JSON within the limits, or a value has another type than ``kind`` says.
    """

    def refuse(_: str, problem: str) -> MalformedAnswerError:
        return MalformedAnswerError(f"an answer of unexpected form: {problem}")

    with guarded(lambda problem: refuse("", problem)):
        return _parsed(kind, data, refuse)


def _parsed(kind: type[T], data: bytes, refuse: Callable[[str, str], MalformedAnswerError]) -> T:
    value = strict_json.load_value(data, "", refuse, max_bytes=len(data), max_values=MAX_VALUES, surrogates=True)
    if b"\\u" in data:
        value = _encodable(value)
    try:
        found: T = _adapter(kind).validate_python(value)  # type: ignore[arg-type]  # classes have a hash
    except ValidationError as error:
        finding = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(printable(str(part), 60)[1:-1] for part in finding["loc"]) or "the top level"
        raise refuse("", f"{place}: {finding['msg']}") from None
    return found
