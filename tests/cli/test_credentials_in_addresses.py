"""Credentials in an address, where they do not belong: no message, log or record shows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemotron_fp8._secrets import MASK, masked, masked_words
from nemotron_fp8.cli.main import main

KEY, SECRET = "AKIACANARY0123456789", "canarySecret/abcdefghijklmnopqrstuvwxyz0"
ADDRESSES = (
    f"s3://{KEY}:{SECRET}@bucket/src",
    f"s3:{KEY}:{SECRET}@bucket/src",
    f"S3://{KEY}:{SECRET}@bucket/src",
    f"s3://bucket/src?X-Amz-Signature={SECRET}",
    f"https://{KEY}:{SECRET}@host/src",
    f"https://host/src?X-Amz-Signature={SECRET}&x=a@b",
    f"hf://{KEY}:{SECRET}@owner/name",
)


@pytest.mark.parametrize("address", ADDRESSES)
def test_no_command_shows_them(
    address: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    log, metrics = tmp_path / "log", tmp_path / "m.prom"
    watch = ("--log-json", log, "--metrics", metrics)
    for words in (
        *(("status", address), ("inspect", address), ("plan", address), ("verify", address), ("report", address)),
        *(("verify", checkpoint, address), ("compare", checkpoint, address), ("evaluate", address, checkpoint)),
        *(("quantize", address, tmp_path / "out", *watch), ("quantize", checkpoint, address, *watch)),
        *(("quantize", address, "--in-place"), ("dequantize", address, tmp_path / "out")),
    ):
        monkeypatch.setattr("sys.argv", ["nemotron-fp8", *map(str, words)])
        with pytest.raises(SystemExit):
            main()
        out, err = capfd.readouterr()
        assert out == "", words
        assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1, words
        shown = err + (log.read_text() + metrics.read_text() if log.exists() else "")
        assert not any(part in shown for part in (KEY, SECRET, SECRET.partition("/")[2])), words
    assert json.loads(log.read_text().splitlines()[0])["event"] == "command.started"
    assert not Path("s3:").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {checkpoint.name, "log", "m.prom"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        *((plain, plain) for plain in ("a@b", "/data/a?b#c", "s3://bucket/at@x/src", "hf://owner/name@refs/pr/1")),
        *((plain, plain) for plain in ("https://host:9000/x", "run:1/a", "--include=a.*", "hf_model/x")),
        ("--source=s3://a:b/c@bucket/x", "--source=s3://...@bucket/x"),
        ("s3://a:b/c", "s3://..."),
        ("gs://bucket/x#y", "gs://bucket/x?..."),
        ("hf_" + "x" * 34, MASK),
    ],
)
def test_masks(text: str, shown: str) -> None:
    """Only what may be a credential is masked, so that a recorded command can be run again."""
    assert masked(text) == shown


def test_values_of_the_environment_are_masked_in_a_command() -> None:
    environment = {
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "NEMOTRON_FP8_TOKEN_ENV": "SOME_LONG_NAME",
        "PATH": "/usr/bin",
    }
    words = ["--token-env", "SOME_LONG_NAME", SECRET, "/usr/bin"]
    assert masked_words(words, environment) == ["--token-env", "SOME_LONG_NAME", MASK, "/usr/bin"]
