"""The XML interface of Google Cloud Storage in front of moto: generations of objects, and conditions on them.

fake-gcs-server has no writes by that interface. The rest of it is that of S3.
Source: "XML API headers" of the reference of Google Cloud Storage.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from tests.store_server.server import StoreServer

if TYPE_CHECKING:
    from collections.abc import Mapping

MATCH = "x-goog-if-generation-match"
GENERATION = "x-goog-generation"
OWNER = "AWS4-HMAC-SHA256 Credential=A/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
"""Authorization of S3, by which moto knows the owner of the objects; it checks no signature."""


class GoogleServer(StoreServer):
    """A `StoreServer` that a client of Google Cloud Storage talks to."""

    def environment(self) -> dict[str, str]:
        return {"STORAGE_EMULATOR_HOST": self.endpoint}

    def forward(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        sent = {**headers, "authorization": OWNER}
        wanted = sent.pop(MATCH, None)
        if wanted == "0":
            sent["if-none-match"] = "*"
        elif wanted is not None:
            _, found, _ = super().forward("HEAD", path.partition("?")[0], {"authorization": OWNER}, b"")
            etag = _etag(found)
            if etag is None or generation(etag) != wanted:
                return 412, {"content-type": "application/xml"}, b"<Error><Code>PreconditionFailed</Code></Error>"
            sent["if-match"] = etag
        status, answered, content = super().forward(method, path, sent, body)
        etag = _etag(answered) or _completed(content)
        if status < 300 and etag is not None:
            answered[GENERATION] = generation(etag)
        return status, answered, content


def generation(etag: str) -> str:
    """Return a number for a version of an object."""
    return str(int(hashlib.sha256(etag.encode()).hexdigest()[:12], 16))


def _etag(headers: Mapping[str, str]) -> str | None:
    return next((value for name, value in headers.items() if name.lower() == "etag"), None)


def _completed(content: bytes) -> str | None:
    """Return the entity tag in the answer that completes an upload."""
    if b"<CompleteMultipartUploadResult" not in content:
        return None
    tag = content.partition(b"<ETag>")[2].partition(b"</ETag>")[0].decode()
    return tag.replace("&quot;", '"') or None
