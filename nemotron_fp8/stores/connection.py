"""Make obstore's objects from the environment, as the tools of each store read it.

obstore reads ``AWS_*``, ``GOOGLE_*`` and ``AZURE_*`` itself. Added here: profiles of ``~/.aws`` through boto3,
``AWS_ENDPOINT_URL_S3``, ``STORAGE_EMULATOR_HOST``, and the rule that credentials travel encrypted.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nemotron_fp8.errors import MissingExtraError
from nemotron_fp8.errors.stores import NoStoreCredentialsError, StoreSettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nemotron_fp8.stores.address import StoreAddress

CONNECT = 20.0
"""Seconds to open a connection."""
REQUEST = 300.0
"""Longest time of one request, in seconds; a range of 8 MiB needs 28 KB/s."""
UPLOAD_RETRIES = 10
UPLOAD_SECONDS = 240.0
"""Retries of one part of an upload, and their time in seconds: credentials are not renewed in between."""
_OWN_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
"""Variables of credentials that obstore reads itself."""
_TRUE = ("1", "true", "yes", "on")


def require_obstore() -> None:
    """Check that the extra is installed.

    Raises:
        MissingExtraError: it is not.
    """
    if find_spec("obstore") is None:
        raise MissingExtraError("stores", "obstore")


def connect(address: StoreAddress, timeout: float, *, upload: bool) -> Any:
    """Return obstore's object of a bucket. No request is made.

    Args:
        address: the folder.
        timeout: seconds without a byte after which a connection counts as dead.
        upload: retry requests inside obstore, for the parts of an upload.

    Raises:
        MissingExtraError: obstore is not installed.
        StoreSettingsError: a variable of the environment has an unusable value.
        NoStoreCredentialsError: a profile is named that cannot be read.
    """
    require_obstore()
    client: dict[str, Any] = {
        "timeout": timedelta(seconds=REQUEST),
        "connect_timeout": timedelta(seconds=min(CONNECT, timeout)),
    }
    if not upload:  # during an upload nothing is read for long
        client["read_timeout"] = timedelta(seconds=timeout)
    retry: dict[str, Any] = {"max_retries": 0}
    if upload:
        retry = {"max_retries": UPLOAD_RETRIES, "retry_timeout": timedelta(seconds=UPLOAD_SECONDS)}
    make = {"s3": _s3, "gs": _gs, "az": _az}[address.scheme]
    _check_variables(address)
    try:
        with no_panic(address):
            return make(address, client, retry)
    except (NoStoreCredentialsError, StoreSettingsError):
        raise
    except Exception as error:  # of obstore, about a variable: its text may hold the value
        problem = f"the settings of the environment cannot be used ({type(error).__name__})"
        raise StoreSettingsError(str(address), f"{problem}; check {_VARIABLES[address.scheme]}") from None


_VARIABLES = {
    "s3": "AWS_REGION, AWS_ENDPOINT_URL and the other AWS_ variables",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS and the other GOOGLE_ variables",
    "az": "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ENDPOINT and the other AZURE_ variables",
}


_IN_REQUESTS = {
    "s3": (
        *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_TOKEN", "AWS_REGION"),
        *("AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_PROXY_URL"),
        *("AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_REQUEST_PAYER"),
        *("AWS_CONTAINER_AUTHORIZATION_TOKEN", "AWS_ROLE_ARN", "AWS_SSE_KMS_KEY_ID"),
    ),
    "gs": ("STORAGE_EMULATOR_HOST", "GOOGLE_PROXY_URL"),
    "az": (
        *("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY"),
        *("AZURE_STORAGE_SAS_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_TOKEN", "AZURE_STORAGE_ENDPOINT"),
        *("AZURE_ENDPOINT", "AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET", "AZURE_TENANT_ID", "AZURE_PROXY_URL"),
        *("AZURE_STORAGE_CLIENT_ID", "AZURE_STORAGE_CLIENT_SECRET", "AZURE_STORAGE_TENANT_ID"),
    ),
}
"""Variables whose values become parts of requests, where no line can end."""


def _check_variables(address: StoreAddress) -> None:
    """Refuse values that no request can hold: the end of a line, as of a secret that was saved with one.

    Raises:
        StoreSettingsError: a variable has such a value, which is not shown.
    """
    for name in _IN_REQUESTS[address.scheme]:
        value = os.environ.get(name, "")
        if value != value.strip() or not value.isprintable():
            problem = f"{name} has white space at an end, or unprintable characters, such as the end of a line"
            raise StoreSettingsError(str(address), f"{problem}; set it without them")


@contextmanager
def no_panic(address: StoreAddress) -> Iterator[None]:
    """Turn a panic inside obstore, which no ``except Exception`` catches, into an error of ours.

    Raises:
        StoreSettingsError: the settings, which obstore checks as it uses them, cannot be used.
    """
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # its class is private to each library of Rust
            raise
        problem = "the client of the store broke down over the settings of the environment"
        raise StoreSettingsError(str(address), f"{problem}; check {_VARIABLES[address.scheme]}") from None


def _s3(address: StoreAddress, client: dict[str, Any], retry: dict[str, Any]) -> Any:
    from obstore.store import S3Store

    make: Any = S3Store
    options: dict[str, Any] = {}
    endpoint = _variable("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    if endpoint is not None:
        options["endpoint"] = endpoint.rstrip("/")
        client["allow_http"] = _allow_http(address, endpoint, "AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP")
    provider = _profile(address)
    if provider is not None:
        options["credential_provider"] = provider
    return make(address.bucket, client_options=client, retry_config=retry, **options)


def _profile(address: StoreAddress) -> Any | None:
    """Return a provider of the credentials of a profile; None if obstore finds credentials itself.

    Raises:
        NoStoreCredentialsError: a profile is to be used, but cannot be read.
    """
    named = os.environ.get("AWS_PROFILE")
    if not named and (_is_set("AWS_SKIP_SIGNATURE") or any(os.environ.get(name) for name in _OWN_CREDENTIALS)):
        return None
    home = Path.home() / ".aws"
    files = (
        Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or home / "credentials"),
        Path(os.environ.get("AWS_CONFIG_FILE") or home / "config"),
    )
    if not named and not any(path.is_file() for path in files):
        return None
    action = "read the credentials"
    if find_spec("boto3") is None:
        problem = "a profile of ~/.aws is set, which needs boto3"
        advice = "install it (pip install boto3), or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        raise NoStoreCredentialsError(str(address), action, problem, advice)
    import boto3
    from obstore.auth.boto3 import Boto3CredentialProvider

    try:
        return Boto3CredentialProvider(boto3.Session())
    except Exception as error:  # of botocore: an unknown profile, a malformed file
        problem = f"the profile of ~/.aws cannot be used ({type(error).__name__})"
        advice = "check AWS_PROFILE and the files of ~/.aws"
        raise NoStoreCredentialsError(str(address), action, problem, advice) from None


def _gs(address: StoreAddress, client: dict[str, Any], retry: dict[str, Any]) -> Any:
    from obstore.store import GCSStore

    make: Any = GCSStore
    options: dict[str, Any] = {}
    emulator = _variable("STORAGE_EMULATOR_HOST")
    if emulator is not None:
        base = emulator if "://" in emulator else f"http://{emulator}"
        # Without a signature, obstore reads, but does not write; so the emulator is described as a key without one.
        account = {"private_key": "", "private_key_id": "", "client_email": "", "disable_oauth": True}
        options = {"service_account_key": json.dumps(account | {"gcs_base_url": base.rstrip("/")})}
        client["allow_http"] = _allow_http(address, base, "STORAGE_EMULATOR_HOST", "GOOGLE_ALLOW_HTTP")
    return make(address.bucket, client_options=client, retry_config=retry, **options)


def _az(address: StoreAddress, client: dict[str, Any], retry: dict[str, Any]) -> Any:
    from obstore.store import AzureStore

    make: Any = AzureStore
    endpoint = _variable("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
    if endpoint is not None:
        client["allow_http"] = _allow_http(address, endpoint, "AZURE_STORAGE_ENDPOINT", "AZURE_ALLOW_HTTP")
    elif _is_set("AZURE_STORAGE_USE_EMULATOR"):
        client["allow_http"] = True
    return make(address.bucket, client_options=client, retry_config=retry)


def _variable(*names: str) -> str | None:
    """Return the first variable that is set."""
    return next((value for name in names if (value := os.environ.get(name))), None)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in _TRUE


def _allow_http(address: StoreAddress, endpoint: str, name: str, permission: str) -> bool:
    """Return True for an endpoint without encryption, which must be this machine or be permitted.

    Raises:
        StoreSettingsError: the endpoint is no address, or not encrypted and not permitted.
    """
    try:
        parts = urlsplit(endpoint)
        host = parts.hostname or ""
        port = parts.port  # noqa: F841  # raises ValueError unless it is one
    except ValueError:
        host, parts = "", urlsplit("")
    if parts.scheme not in ("http", "https") or not host or parts.username is not None or parts.query:
        raise StoreSettingsError(str(address), f"{name} is not the address of a store; set one like https://HOST:PORT")
    if parts.scheme == "https":
        return False
    if host in ("localhost", "::1") or host.startswith("127.") or _is_set(permission):
        return True
    problem = f"{name} has no encryption (http://), so that others could read credentials and files"
    raise StoreSettingsError(str(address), f"{problem}; use https://, or allow it with {permission}=true")
