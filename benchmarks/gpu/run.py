"""Run of one stage: its device, its lines, and steps that fail without ending the stage.

A run is of one of three modes, in the environment variable `benchmarks.gpu.lines.MODE`:

- ``device``: on a CUDA device.
- ``dry``: on the CPU, in Triton's interpreter, with small shapes. It shows that the code runs.
- ``until-launch``: without a device. Kernels are compiled for sm_90, inputs are tensors without memory, and every step
  stops where the first result of a kernel is needed.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal

import torch

from benchmarks.gpu import cases
from benchmarks.gpu.lines import LINES, MODE

if TYPE_CHECKING:
    from collections.abc import Iterator

Mode = Literal["device", "dry", "until-launch"]
FATAL = ("illegal memory access", "unspecified launch failure", "device-side assert", "misaligned address", "ECC error")
"""Errors after which every further call of the process fails."""


class NoDeviceError(RuntimeError):
    """The result of a kernel is needed, and there is no CUDA device."""


class Run:
    """Run of one stage in this process."""

    def __init__(self) -> None:
        self.mode: Mode = os.environ.get(MODE, "device")  # type: ignore[assignment]
        self.dry = self.mode == "dry"
        self.device = {"device": "cuda", "dry": "cpu", "until-launch": "meta"}[self.mode]
        self.compared = self.different = 0
        self._launches: list[str] = []
        self._compiled: set[str] = set()
        dry = self.dry
        self.shapes = cases.DRY_SHAPES if dry else cases.SHAPES
        self.peers = cases.DRY_PEERS if dry else cases.PEERS
        self.ragged = cases.DRY_RAGGED if dry else cases.RAGGED
        self.odd = cases.DRY_ODD if dry else cases.ODD
        self.float32 = cases.DRY_FLOAT32 if dry else cases.FLOAT32
        self.rounded = cases.DRY_ROUNDED if dry else cases.ROUNDED
        self.lists = cases.DRY_LISTS if dry else cases.LISTS
        self.checked = cases.DRY_CHECKED if dry else cases.CHECKED
        self.checked_lists = cases.DRY_CHECKED_LISTS if dry else cases.CHECKED_LISTS

    def prepare(self) -> None:
        """Set up Triton for the mode.

        Raises:
            NoDeviceError: the mode needs a device, and there is none.
        """
        if self.mode != "device":
            from torch.utils import _triton

            # torchao defines its kernels only if torch finds a device.
            _triton.has_triton = lambda: True
        if self.dry:
            torch.set_num_threads(1)
            from tests.kernels.interpreter import install

            install()
        elif self.mode == "until-launch":
            self._compile_only()
        elif not torch.cuda.is_available():
            raise NoDeviceError("no CUDA device; --dry runs without one, --until-launch compiles the kernels")

    def emit(self, **fields: Any) -> None:
        """Write a line; to the driver, or without one to the standard output."""
        text = json.dumps(fields) + "\n"
        descriptor = os.environ.get(LINES)
        if descriptor is None:
            print(text, end="", flush=True)
        else:
            data = text.encode()
            while data:
                data = data[os.write(int(descriptor), data) :]

    @contextmanager
    def step(self, name: str, **fields: Any) -> Iterator[None]:
        """Report an error of the step as a line, so that the stage goes on.

        Raises:
            SystemExit: the device can no longer be used by this process.
        """
        self._launches.clear()
        try:
            yield
        except NoDeviceError as stop:
            self.emit(case="stopped", step=name, stopped=str(stop), compiled=list(self._launches), **fields)
        except Exception as error:  # one candidate must not end the stage
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            self.emit(error=problem, step=name, **fields)
            if any(text in problem for text in FATAL):
                raise SystemExit(3) from error
        if self.mode == "device":
            # The buffers of the step are gone; the next shape needs their room in other sizes.
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Wait for the device.

        Raises:
            NoDeviceError: the kernels have been compiled only.
        """
        if self.mode == "until-launch":
            raise NoDeviceError("no CUDA device")
        if self.mode == "device":
            torch.cuda.synchronize()

    def compare(self, found: torch.Tensor, expected: torch.Tensor, what: str, **fields: Any) -> bool:
        """Compare two tensors as bytes, and write a line if they differ."""
        self.compared += 1
        same = (found.shape, found.dtype) == (expected.shape, expected.dtype) and torch.equal(
            _bytes(found), _bytes(expected)
        )
        if not same:
            self.different += 1
            self.emit(check=f"bytes of {what}", compared=1, different=1, **fields)
        return same

    def report_compared(self, check: str) -> None:
        """Write the number of comparisons since the last report that found equal bytes."""
        if self.compared:
            self.emit(check=check, compared=self.compared - self.different, different=0)
        self.compared = self.different = 0

    def emit_clock(self, **fields: Any) -> None:
        """Write the present clock of the SMs in MHz, if it can be read."""
        if self.mode == "device":
            with suppress(Exception):  # no NVML, or no permission
                self.emit(case="clock", sm_clock_mhz=int(torch.cuda.clock_rate()), **fields)

    def _compile_only(self) -> None:
        """Replace launches of Triton kernels by their compilation for sm_90."""
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver, jit

        class Target:
            """The part of a Triton driver that compilation needs."""

            def get_current_device(self) -> int:
                return 0

            def get_current_stream(self, device: int) -> int:
                return 0

            def get_current_target(self) -> Any:
                return GPUTarget("cuda", 90, 32)

        driver.set_active(Target())
        launch = jit.JITFunction.run

        def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            started = time.perf_counter()
            compiled = launch(kernel, *arguments, grid=grid, warmup=True, **options)
            name = kernel.fn.__name__
            self._launches.append(name)
            if compiled.hash not in self._compiled:
                self._compiled.add(compiled.hash)
                self.emit(
                    case="compiled",
                    kernel=name,
                    variant=compiled.hash[:16],
                    cubin_bytes=len(compiled.asm["cubin"]),
                    seconds=time.perf_counter() - started,
                )
            return compiled

        jit.JITFunction.run = compile_only


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    dense = tensor.detach().cpu().contiguous()
    return dense.view(torch.uint8) if dense.ndim else dense.view(1).view(torch.uint8)
