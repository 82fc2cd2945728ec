"""Addresses and settings: what names a store, and what the environment must and must not say."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8.errors.stores import NoStoreCredentialsError, StoreAddressError, StoreSettingsError
from nemotron_fp8.stores.address import StoreAddress, is_store, local_path, parse_store
from nemotron_fp8.stores.connection import connect, no_panic

if TYPE_CHECKING:
    from pathlib import Path

CANARY = "canary0123456789"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No variables and no files of the person who runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for prefix in ("AWS_", "GOOGLE_", "AZURE_", "STORAGE_"):
        for name in [name for name in os.environ if name.startswith(prefix)]:
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("s3://bucket/a/b", StoreAddress("s3", "bucket", "a/b")),
        ("s3://bucket/a/", StoreAddress("s3", "bucket", "a")),
        ("gs://my.bucket_1", StoreAddress("gs", "my.bucket_1", "")),
        ("az://container/é ü", StoreAddress("az", "container", "é ü")),
    ],
)
def test_addresses(text: str, address: StoreAddress) -> None:
    assert is_store(text)
    assert parse_store(text) == address
    assert parse_store(str(address)) == address
    assert address.child("x").parent() == address
    assert address.key("x").endswith("x")


@pytest.mark.parametrize(
    "text",
    [
        *("s3://", "s3:/bucket/a", "s3://bucket//a", "s3://bucket/a//b", "s3://bucket/../a", "s3://bucket/./a"),
        *("s3://b..c/a", "s3://-b/a", "s3://bucket/a\nb", "s3://bucket/" + "x" * 800, "S3://bucket/a"),
        *(
            f"s3://{CANARY}:{CANARY}@bucket/a",
            f"s3://{CANARY}:x/{CANARY}@bucket/a",
            f"s3://{CANARY}:x/{CANARY}",
        ),
        *(f"s3://{CANARY}@bucket/a",),
        *(f"s3://bucket/a?X-Amz-Signature={CANARY}", f"az://c/a#{CANARY}"),
        *("s3://bucket/\ud800", "gs:///a"),
    ],
)
def test_texts_that_are_no_addresses(text: str) -> None:
    assert is_store(text)
    with pytest.raises(StoreAddressError) as refused:
        parse_store(text)
    assert CANARY not in str(refused.value)
    assert CANARY not in repr(vars(refused.value))


def test_file_addresses() -> None:
    assert local_path("file:///a%20b/c") == "/a b/c"
    assert local_path("/a") is None
    for text in ("file://host/a", f"file:///a?x={CANARY}", "file:a"):
        if text == "file:a":
            assert local_path(text) is None
            continue
        with pytest.raises(StoreAddressError) as refused:
            local_path(text)
        assert CANARY not in str(refused.value)


@pytest.mark.parametrize(
    ("scheme", "variables", "named"),
    [
        ("s3", {"AWS_ENDPOINT_URL": "http://example.com"}, "AWS_ALLOW_HTTP"),
        ("s3", {"AWS_ENDPOINT_URL": "ftp://example.com"}, "AWS_ENDPOINT_URL"),
        ("s3", {"AWS_ENDPOINT_URL": f"https://{CANARY}:{CANARY}@example.com"}, "AWS_ENDPOINT_URL"),
        ("s3", {"AWS_ENDPOINT_URL": "https://[::1"}, "AWS_ENDPOINT_URL"),
        ("s3", {"AWS_ENDPOINT_URL": "http://127.0.0.1:99999"}, "AWS_ENDPOINT_URL"),
        ("s3", {"AWS_ACCESS_KEY_ID": f"{CANARY}\n"}, "AWS_ACCESS_KEY_ID has white space"),
        ("s3", {"AWS_SESSION_TOKEN": f"{CANARY}\r\nX: y"}, "AWS_SESSION_TOKEN has white space"),
        ("s3", {"AWS_REGION": "us-east-1\n"}, "AWS_REGION has white space"),
        ("az", {"AZURE_STORAGE_SAS_KEY": f"{CANARY}\n"}, "AZURE_STORAGE_SAS_KEY has white space"),
        ("gs", {"STORAGE_EMULATOR_HOST": "example.com:1"}, "GOOGLE_ALLOW_HTTP"),
        ("gs", {"GOOGLE_SERVICE_ACCOUNT_KEY": f'{{"private_key": "{CANARY}'}, "GOOGLE_APPLICATION_CREDENTIALS"),
        ("az", {"AZURE_STORAGE_ENDPOINT": "http://example.com"}, "AZURE_ALLOW_HTTP"),
        ("az", {"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_STORAGE_ACCOUNT_KEY": f"?{CANARY}"}, "AZURE_STORAGE"),
        ("az", {}, "AZURE_STORAGE_ACCOUNT_NAME"),
    ],
)
def test_settings_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, scheme: str, variables: dict[str, str], named: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreSettingsError, match=named) as refused:
        connect(StoreAddress(scheme, "bucket"), 60, upload=False)
    assert CANARY not in str(refused.value)
    assert refused.value.__cause__ is None


def test_a_panic_of_the_client_is_an_error_of_settings() -> None:
    """Some settings are not checked before use: a token that is read from a file."""
    kind = type("PanicException", (BaseException,), {})
    with pytest.raises(StoreSettingsError, match="AWS_REGION") as refused, no_panic(StoreAddress("s3", "bucket")):
        raise kind(CANARY)
    assert CANARY not in str(refused.value)
    with pytest.raises(KeyboardInterrupt), no_panic(StoreAddress("s3", "bucket")):
        raise KeyboardInterrupt


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_this_machine_needs_no_encryption(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:9000")
    connect(StoreAddress("s3", "bucket"), 60, upload=True)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://example.com")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    connect(StoreAddress("s3", "bucket"), 60, upload=False)


def test_profiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A profile is read by boto3, if it is named, or if the environment has no credentials."""
    address = StoreAddress("s3", "bucket")
    monkeypatch.setenv("AWS_PROFILE", "missing")
    with pytest.raises(NoStoreCredentialsError, match="AWS_PROFILE"):
        connect(address, 60, upload=False)
    file = tmp_path / ".aws" / "credentials"
    file.parent.mkdir()
    file.write_text(f"[missing]\naws_access_key_id = a\naws_secret_access_key = {CANARY}\n")
    assert CANARY not in repr(connect(address, 60, upload=False))
    monkeypatch.setattr("nemotron_fp8.stores.connection.find_spec", lambda name: name if name == "obstore" else None)
    with pytest.raises(NoStoreCredentialsError, match="pip install boto3"):
        connect(address, 60, upload=False)
    monkeypatch.delenv("AWS_PROFILE")
    with pytest.raises(NoStoreCredentialsError, match="pip install boto3"):
        connect(address, 60, upload=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    connect(address, 60, upload=False)
