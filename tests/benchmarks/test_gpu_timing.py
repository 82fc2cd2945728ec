"""Timing of the GPU run on a made-up device: warm-up, graphs, rotation, and steps that fail."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks.gpu import timing
from benchmarks.gpu.lines import MODE
from benchmarks.gpu.run import NoDeviceError, Run

if TYPE_CHECKING:
    from collections.abc import Iterator

CALL_MS = 0.3


class FakeCuda:
    """Device whose calls take `CALL_MS` each; time passes by calls only."""

    def __init__(self) -> None:
        self.now = 0.0
        self.captured: list[list[Any]] = []
        self.replays = 0
        self.available = True
        self._capturing = False
        cuda = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = cuda.now

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        class Graph:
            def replay(self) -> None:
                cuda.replays += 1
                cuda.now += CALL_MS * len(cuda.captured[-1])

        self.Event, self.CUDAGraph = Event, Graph

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

    def current_stream(self) -> Stream:
        return self.Stream()

    @contextmanager
    def stream(self, _stream: object) -> Iterator[None]:
        yield

    @contextmanager
    def graph(self, _graph: object, stream: object) -> Iterator[None]:
        self.captured.append([])
        self._capturing = True
        yield
        self._capturing = False

    def is_available(self) -> bool:
        return self.available

    def synchronize(self) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def call(self, name: str) -> None:
        if self._capturing:
            self.captured[-1].append(name)
        else:
            self.now += CALL_MS


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    found = FakeCuda()
    monkeypatch.setattr(torch, "cuda", found)
    monkeypatch.setenv(MODE, "device")
    return found


def test_a_graph_holds_all_calls_until_it_is_long_enough(cuda: FakeCuda) -> None:
    calls = [lambda name=name: cuda.call(name) for name in "ab"]
    found = timing.timed(Run(), calls, samples=5)
    assert found == (pytest.approx(CALL_MS / 1e3),) * 3 + (5,)
    assert cuda.captured == [["a", "b"] * 7]  # 4 ms of rounds of 0.6 ms
    assert cuda.replays == 2 + 5


def test_a_device_is_needed(cuda: FakeCuda) -> None:
    cuda.available = False
    with pytest.raises(NoDeviceError, match="no CUDA device"):
        Run().prepare()
    cuda.available = True
    Run().prepare()
    Run().wait()


def test_buffers_rotate_over_more_than_l2(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ROTATED_BYTES", 30_000)
    run = Run()
    run.device = "cpu"
    inputs, outs = timing.buffers(run, (10, 100), shift=1)
    assert len(inputs) == len(outs) == 10
    assert len({w.data_ptr() for w in inputs}) == 10
    assert all(w.data_ptr() % 16 == 2 and q.data_ptr() % 16 == 1 for w, q in zip(inputs, outs, strict=True))
    assert all(float(w.abs().max()) > 0 for w in inputs)
    assert len(timing.buffers(run, (1000, 1000))[0]) == 2


def test_a_step_that_fails_does_not_end_the_stage(cuda: FakeCuda, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run()
    with run.step("first", shape="a"):
        raise ValueError("broken")
    with pytest.raises(SystemExit), run.step("second"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    printed = capsys.readouterr().out.splitlines()
    assert '"error": "ValueError: broken"' in printed[0]
    assert "illegal memory access" in printed[1]


def test_wrong_bytes_are_written_at_once(cuda: FakeCuda, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run()
    assert run.compare(torch.zeros(3), torch.zeros(3), "a")
    assert not run.compare(torch.zeros(3), -torch.zeros(3), "b", shape="x")
    assert not run.compare(torch.zeros(3), torch.zeros(3, dtype=torch.float16), "c")
    run.report_compared("bytes")
    lines = capsys.readouterr().out.splitlines()
    assert [('"different": 1' in line) for line in lines] == [True, True, False]
    assert '"compared": 1' in lines[2]
