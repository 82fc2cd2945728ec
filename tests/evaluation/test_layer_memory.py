"""Buffers of layers: each holds its own layer while it is used, on a CPU, in files, and on a device that is late."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8.inference.layer_memory import LayerMemory
from tests.support.fake_device import DeviceFailure, FakeDevice

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

SIZES = [100, 64, 1, 0, 100, 37]


def fill(value: int, size: int, delay: float = 0.0) -> Callable[[torch.Tensor], None]:
    def write(buffer: torch.Tensor) -> None:
        half = size // 2
        buffer[:half] = value
        time.sleep(delay)
        buffer[half:size] = value

    return write


def check(memory: LayerMemory, delay: float = 0.0) -> None:
    jobs = [(size, fill(number + 1, size, delay)) for number, size in enumerate(SIZES)]
    with memory, memory.layers(jobs) as buffers:
        for number, (size, buffer) in enumerate(zip(SIZES, buffers, strict=True)):
            for _ in range(3):
                assert (buffer[:size] == number + 1).all()
                time.sleep(delay)


@pytest.mark.parametrize("ahead", [False, True])
def test_on_a_cpu(ahead: bool) -> None:
    check(LayerMemory(100, ahead), 0.002)


@pytest.mark.parametrize("ahead", [False, True])
def test_in_files(ahead: bool, tmp_path: Path) -> None:
    check(LayerMemory(100, ahead, folder=tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_on_a_device_that_is_late(ahead: bool, seed: int) -> None:
    device = FakeDevice(seed, slowest=0.01)
    check(LayerMemory(100, ahead, device), 0.001)
    assert device.host_now == 0
    assert device.host_peak == device.memory_peak == 100 * (1 + ahead)
    device.end()


def test_a_failure_of_the_device() -> None:
    device = FakeDevice(0, fail=("upload", 3))
    with pytest.raises(DeviceFailure):
        check(LayerMemory(100, True, device))
    device.end()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("failing", range(len(SIZES)))
def test_a_layer_that_cannot_be_read(ahead: bool, failing: int) -> None:
    def fail(_: torch.Tensor) -> None:
        raise OSError("unreadable")

    jobs = [(size, fail if number == failing else fill(1, size)) for number, size in enumerate(SIZES)]
    seen = 0
    with pytest.raises(OSError, match="unreadable"), LayerMemory(100, ahead) as memory, memory.layers(jobs) as buffers:
        for _ in buffers:
            seen += 1
    assert seen == failing


def test_an_interruption_during_the_use_of_a_layer() -> None:
    jobs = [(10, fill(1, 10)), (10, fill(2, 10, 0.05))]
    with pytest.raises(KeyboardInterrupt), LayerMemory(100, True) as memory, memory.layers(jobs) as buffers:
        next(buffers)
        raise KeyboardInterrupt
