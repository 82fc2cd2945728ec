"""Pickles of strangers: read as values, never carried out."""

from __future__ import annotations

import os
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nemotron_fp8.errors.nemo import ForbiddenPickleError, MalformedDistError
from nemotron_fp8.sources.nemo.inert_pickle import read_pickle
from nemotron_fp8.sources.open import open_source
from tests.support.nemo_writer import Sizes

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def nemo(tmp_path: Path) -> Path:
    """A torch_dist checkpoint as far as its ``.metadata``, which the test writes."""
    (tmp_path / "nemo" / "model_weights").mkdir(parents=True)
    (tmp_path / "nemo" / "model_config.yaml").write_text(Sizes().yaml())
    return tmp_path / "nemo"


class Call:
    """Pickles as a call."""

    def __init__(self, callee: Any, *args: Any) -> None:
        self.callee, self.args = callee, args

    def __reduce__(self) -> Any:
        return self.callee, self.args


FORBIDDEN = [os.system, eval, exec, open, getattr, __import__, torch.load, pickle.loads, type, print]


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("callee", FORBIDDEN, ids=lambda callee: callee.__name__)
def test_pickle_that_calls_something(tmp_path: Path, nemo: Path, callee: Any, protocol: int) -> None:
    """Nothing is called, nothing imported: an error that names what the pickle asked for."""
    mark = tmp_path / "called"
    data = pickle.dumps({"a": Call(callee, f"touch {mark}")}, protocol)
    (nemo / "model_weights" / ".metadata").write_bytes(data)
    with pytest.raises(ForbiddenPickleError) as caught:
        open_source(nemo)
    assert callee.__name__ in caught.value.wanted
    assert not mark.exists()


def test_allowed_names_are_not_called_either() -> None:
    """``torch.Size`` of a list is a record of that, whatever torch would make of it."""
    record = read_pickle(pickle.dumps(Call(torch.Size, [-1, "x"])), "x", {"torch.Size"})
    assert (record.kind, record.args) == ("torch.Size", ([-1, "x"],))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"\x80\x04",
        b"\x80\x04K\x01",
        b"\x80\x04)\x81.",
        b"\x80\x04]\x94h\x09.",
        b"\x80\x04K\x01a.",
        b"\x80\x04(((.",
        b"\x80\x04K\x01K\x02R.",
        b"\x80\x04\x8a\xff" + b"\xff" * 300 + b".",
        b"\x80\x04X\xff\xff\xff\x7fabc.",
        b"\x80\x04r\xff\xff\xff\x7f.",
        b"c__builtin__\neval\n.",
        b"(i__builtin__\neval\n.",
        b"\x80\x04\x82\x01.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x05\x97.",
        b"\x80\x04}(K\x01u.",
    ],
)
def test_hostile_opcodes(nemo: Path, data: bytes) -> None:
    """Programs that underflow, lie about lengths, jump in the memo, or use what the format has no use for."""
    (nemo / "model_weights" / ".metadata").write_bytes(data)
    with pytest.raises(MalformedDistError):
        open_source(nemo)


def test_pickle_that_grows_when_it_is_walked(nemo: Path) -> None:
    """Sixty tuples, each of the one before twice: 2^60 values to whoever hashes, compares or prints them."""
    value: Any = ()
    for _ in range(60):
        value = (value, value)
    data = pickle.dumps({"state_dict_metadata": {value and "a": value}, "storage_data": value}, 4)
    (nemo / "model_weights" / ".metadata").write_bytes(data)
    with pytest.raises(MalformedDistError):
        open_source(nemo)
