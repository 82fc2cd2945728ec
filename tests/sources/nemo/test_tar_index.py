""".nemo archives: read without being unpacked, and what a stranger's archive can hold."""

from __future__ import annotations

import gzip
import io
import tarfile
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8.errors.nemo import MalformedArchiveError, MissingChunkError
from nemotron_fp8.sources.nemo.tar_index import files_of_archive
from nemotron_fp8.sources.open import open_source
from tests.sources.nemo.test_name_mapping import assert_same, read_all
from tests.support.nemo_writer import Sizes, hf_tensors, write_nemo

if TYPE_CHECKING:
    from pathlib import Path


def member(name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE, **changes: object) -> tuple[object, bytes]:
    """A member of an archive."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data), kind
    for key, value in changes.items():
        setattr(info, key, value)
    return info, data


def write_tar(path: Path, *members: tuple[object, bytes], kind: int = tarfile.GNU_FORMAT) -> Path:
    """An archive of these members."""
    with tarfile.open(path, "w:", format=kind) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("top", ["./", ""])
def test_checkpoint_in_an_archive(tmp_path: Path, kind: int, top: str) -> None:
    """In every dialect of tar that NeMo's Python may have written."""
    sizes = Sizes(layers=2)
    tensors = hf_tensors(sizes)
    write_nemo(tmp_path / "nemo", tensors, sizes, "uneven")
    with tarfile.open(tmp_path / "it.nemo", "w:", format=kind) as archive:
        for path in sorted((tmp_path / "nemo").iterdir()):
            archive.add(path, arcname=top + path.name)
    assert_same(read_all(open_source(tmp_path / "it.nemo")), tensors)


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(tmp_path: Path, kind: int) -> None:
    name = "/".join(["x" * 90] * 4)
    files, _ = files_of_archive(write_tar(tmp_path / "a.nemo", member(name, b"abc"), member("é" * 80, b"d"), kind=kind))
    assert files.read(name) == b"abc"
    assert files.read("é" * 80) == b"d"


HOSTILE = {
    "absolute": (member("/etc/passwd"),),
    "parent": (member("model_weights/../../x"),),
    "backslash": (member("a\\..\\b"),),
    "symbolic link": (member("a", b"", tarfile.SYMTYPE, linkname="/etc/passwd"),),
    "hard link": (member("a"), member("b", b"", tarfile.LNKTYPE, linkname="a")),
    "device": (member("a", b"", tarfile.CHRTYPE),),
    "pipe": (member("a", b"", tarfile.FIFOTYPE),),
    "sparse": (member("a", b"", tarfile.GNUTYPE_SPARSE),),
    "twice": (member("a"), member("./a")),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_members(tmp_path: Path, what: str) -> None:
    path = write_tar(tmp_path / "a.nemo", *HOSTILE[what])
    with pytest.raises(MalformedArchiveError) as caught:
        open_source(path)
    assert caught.value.file == str(path)


def patched(data: bytes, at: int, new: bytes) -> bytes:
    """An archive whose first header is changed, with a checksum that fits again."""
    header = bytearray(data[:512])
    header[at : at + len(new)] = new
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


@pytest.mark.parametrize(
    "size", [b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"9" * 11 + b"\0", b"-0000000001\0", b"\0" * 12]
)
def test_hostile_sizes(tmp_path: Path, size: bytes) -> None:
    """Sizes past the end, negative ones and text: refused before a byte is read for them."""
    path = write_tar(tmp_path / "a.nemo", member("a"))
    path.write_bytes(patched(path.read_bytes(), 124, size))
    with pytest.raises(MalformedArchiveError):
        files_of_archive(path)


@pytest.mark.parametrize("kind", [b"L", b"x"])
def test_huge_name(tmp_path: Path, kind: bytes) -> None:
    """A name of as many bytes as the archive has is no reason to read it into memory."""
    path = write_tar(tmp_path / "a.nemo", member("a", b"n" * (1 << 20)))
    path.write_bytes(patched(path.read_bytes(), 156, kind))
    with pytest.raises(MalformedArchiveError, match="the long name at byte"):
        files_of_archive(path)


@pytest.mark.parametrize(
    "record", [b"30 path=a\n", b"x path=a\n", b"9 pathxx\n", b"17 size=1e999999\n", b"0 a=b\n", b"9"]
)
def test_hostile_extended_headers(tmp_path: Path, record: bytes) -> None:
    path = write_tar(tmp_path / "a.nemo", member("a", record), member("b"))
    path.write_bytes(patched(path.read_bytes(), 156, b"x"))
    with pytest.raises(MalformedArchiveError):
        files_of_archive(path)


def test_cut_off_at_any_block(tmp_path: Path) -> None:
    """An archive that ends early is noticed, wherever it ends."""
    path = write_tar(tmp_path / "a.nemo", member("a", b"1" * 700), member("b", b"2" * 10))
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for size in (*range(0, end, 512), *range(100, end, 512)):
        path.write_bytes(whole[:size])
        with pytest.raises(MalformedArchiveError):
            files_of_archive(path)


def test_any_changed_byte_of_a_header_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.nemo", member("a"))
    whole = path.read_bytes()
    for at in range(512):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x11]) + whole[at + 1 :])
        with pytest.raises(MalformedArchiveError):
            files_of_archive(path)


def test_gzip_says_what_to_do(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.nemo", member("a"))
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(MalformedArchiveError, match="gunzip"):
        open_source(path)


def test_missing_chunk_in_an_archive(tmp_path: Path) -> None:
    sizes = Sizes(layers=1)
    write_nemo(tmp_path / "nemo", hf_tensors(sizes), sizes)
    (tmp_path / "nemo" / "model_weights" / "model.output_layer.weight" / "0.0").unlink()
    with tarfile.open(tmp_path / "it.nemo", "w:") as archive:
        archive.add(tmp_path / "nemo", arcname=".")
    with pytest.raises(MissingChunkError, match=r"output_layer"):
        open_source(tmp_path / "it.nemo")
