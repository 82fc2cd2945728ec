"""A Triton driver whose device is the emulator.

Triton's own specialization, compilation and launch run unchanged for compute capability 9.0. Instead of a cubin, the
binary of a kernel is its PTX. Tensors are on the CPU.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver as active_driver

from .errors import EmulatorError, UnsupportedError
from .lower import Program
from .memory import Memory
from .parse import parse
from .schedule import Grid, Schedule, Settings, run_in_batches
from .storage import LARGE, Storage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

INTEGERS = {"i1": (0, 1), "i32": (-(1 << 31), 1 << 31), "i64": (-(1 << 63), 1 << 63)}
"""Range of each integer type of a signature."""


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: name of its function.
        grid: number of CTAs.
        constants: values of its constexpr arguments.
        dependent: launched with programmatic dependent launch.
    """

    kernel: str
    grid: int
    constants: dict[str, Any]
    dependent: bool


@dataclass(frozen=True)
class Argument:
    """A tensor that a launch may touch.

    Attributes:
        tensor: the tensor.
        name: name of the parameter.
        writable: True if the launch may also store to it.
    """

    tensor: torch.Tensor
    name: str
    writable: bool


class Emulator:
    """The device.

    Attributes:
        settings: conditions of the next launches.
        reachable: tensors that a kernel reaches through a table of addresses, and True for those that it may store
            to; by the address of the table.
        rewrite: function that changes the PTX of a kernel before it runs.
        launches: all launches.
        counts: accesses, bytes and turns of all launches.
        equal: bytes that several CTAs stored without order, equal each time; by tensor and statement.
    """

    def __init__(self) -> None:
        self.settings = Settings()
        self.reachable: dict[int, list[tuple[torch.Tensor, bool]]] = {}
        self.rewrite: Callable[[str], str] | None = None
        self.launches: list[Launch] = []
        self.counts: Counter[str] = Counter()
        self.equal: Counter[str] = Counter()
        self._programs: dict[str, Program] = {}
        self._pending: tuple[Grid, list[Argument]] | None = None
        self._inputs: set[tuple[int, int]] = set()
        self._drawn = 0

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call an operation and wait for its launches.

        Launches may not store to the tensors among the positional arguments. The tensors that the operation allocates
        hold noise at first, so that a byte which no launch stores shows.
        """
        before = self._inputs
        self._inputs = before | {(tensor.data_ptr(), tensor.numel()) for tensor in _tensors(arguments)}
        try:
            with _Noise(self._draw()):
                result = function(*arguments, **options)
            self.synchronize()
        finally:
            self._inputs = before
            self._pending = None
        return result

    def launch(self, text: str, source: Any, metadata: Any, grid: tuple[int, ...], values: list[Any]) -> None:
        """Run a kernel, or keep it until its dependent launch comes."""
        if grid[1:] != (1, 1) or metadata.num_ctas != 1 or metadata.global_scratch_size:
            raise UnsupportedError("grids of several dimensions, clusters or scratch memory")
        program = self._program(text)
        if program.kernel.threads != 32 * metadata.num_warps:
            raise UnsupportedError("threads of the PTX and of the launch differ")
        if metadata.launch_cooperative_grid and grid[0] > self.settings.cooperative:
            raise EmulatorError(f"cooperative launch of {grid[0]} CTAs, {self.settings.cooperative} fit")
        names = source.fn.arg_names
        constants = {names[path[0]]: value for path, value in source.constants.items()}
        self.launches.append(Launch(source.fn.__name__, grid[0], constants, metadata.launch_pdl))
        parameters, tensors = self._arguments(program, names, source.signature, values)
        launched = Grid(program, grid[0], parameters, metadata.shared, Memory())
        launched.cooperative = metadata.launch_cooperative_grid
        if metadata.launch_pdl and self._pending is not None and self.settings.overlap:
            first, self._pending = self._pending, None
            self._execute([first, (launched, tensors)])
            return
        self.synchronize()
        if program.signals:
            self._pending = (launched, tensors)
        else:
            self._execute([(launched, tensors)])

    def synchronize(self) -> None:
        """Run the launch that was kept for its dependent launch."""
        if self._pending is not None:
            first, self._pending = self._pending, None
            self._execute([first])

    def _program(self, text: str) -> Program:
        if self.rewrite is not None:
            text = self.rewrite(text)
        if text not in self._programs:
            self._programs[text] = Program(parse(text))
        return self._programs[text]

    def _draw(self) -> int:
        self._drawn += 1
        return self.settings.seed * 1_000_003 + self._drawn

    def restart(self, settings: Settings) -> None:
        """Set the conditions of the next launches; equal settings give equal runs."""
        self.settings = settings
        self._drawn = 0

    def _arguments(
        self, program: Program, names: list[str], signature: dict[str, str], values: list[Any]
    ) -> tuple[dict[str, np.unsignedinteger], list[Argument]]:
        """Return the values of the parameters, and the tensors that they point to."""
        tensors = []
        parameters: dict[str, np.unsignedinteger] = {}
        symbols = iter(program.kernel.parameters.items())
        for name, value in zip(names, values, strict=True):
            kind = signature[name]
            if kind == "constexpr":
                continue
            symbol, size = next(symbols)
            word = np.uint64 if size == 8 else np.uint32
            if kind.startswith("*"):
                writable = (value.data_ptr(), value.numel()) not in self._inputs
                tensors.append(Argument(value, name, writable))
                parameters[symbol] = word(value.data_ptr())
                reached = self.reachable.get(value.data_ptr(), ())
                tensors += [Argument(tensor, f"{name}[]", writes) for tensor, writes in reached]
            elif kind in INTEGERS:
                low, high = INTEGERS[kind]
                if not low <= value < high:
                    raise EmulatorError(f"{name}={value} does not fit {kind}")
                parameters[symbol] = word(value % (1 << 8 * size))
            elif kind == "fp32":
                parameters[symbol] = np.float32(value).view(np.uint32)
            else:
                raise UnsupportedError(f"argument of type {kind}")
        # Two pointers to scratch memory, which no kernel here has.
        parameters |= {symbol: np.uint64(0) for symbol, _ in symbols}
        return parameters, tensors

    def _execute(self, entries: list[tuple[Grid, list[Argument]]]) -> None:
        settings = self.settings
        memory = Memory()
        grids = [grid for grid, _ in entries]
        for grid, tensors in entries:
            grid.memory = memory
            for argument in tensors:
                _register(memory, argument)
        seed = self._draw()
        try:
            if len(grids) > 1 or settings.scheduled or grids[0].program.synchronizes:
                self.counts["turns"] += Schedule(grids, settings, seed).run()
            else:
                grids[0].rng = np.random.default_rng(seed)
                run_in_batches(grids[0], settings.lanes, settings.only)
        finally:
            self.counts += memory.counts
            self.equal += memory.equal


def _tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _register(memory: Memory, argument: Argument) -> None:
    """Allow accesses to exactly the bytes of the elements of a tensor."""
    tensor = argument.tensor
    if tensor.numel() == 0:
        return
    whole = tensor.untyped_storage()
    storage = memory.find(whole.data_ptr())
    if storage is None:
        data = np.frombuffer((ctypes.c_uint8 * whole.nbytes()).from_address(whole.data_ptr()), np.uint8)
        storage = Storage(whole.data_ptr(), data, argument.name)
        memory.add(storage)
    size = tensor.element_size()
    start = tensor.storage_offset() * size
    if tensor.is_contiguous():
        storage.allow(start, 1, tensor.nbytes, tensor.nbytes, argument.writable)
    elif tensor.ndim == 2 and tensor.stride(1) == 1:
        rows, columns = tensor.shape
        storage.allow(start, rows, tensor.stride(0) * size, columns * size, argument.writable)
    else:
        raise UnsupportedError(f"{argument.name} has strides {tensor.stride()}")


class _Noise(TorchFunctionMode):
    """Fill new tensors with noise instead of leaving them uninitialized."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = np.random.default_rng(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.empty, torch.empty_like, torch.empty_strided) and 0 < result.nbytes <= LARGE:
            whole = result.untyped_storage()
            target = torch.tensor([], dtype=torch.uint8).set_(whole)
            target.copy_(torch.from_numpy(self.rng.integers(0, 256, whole.nbytes(), dtype=np.uint8)))
        return result


EMULATOR = Emulator()


class _Utils:
    """Functions of the driver that Triton calls by name."""

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    @staticmethod
    def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """Return module, function, registers, spills and threads; the function is the PTX."""
        return object(), binary.decode(), 0, 0, 1024


class _Launcher:
    """Launch of one compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.metadata = source, metadata

    def __call__(self, x: int, y: int, z: int, stream: int, function: str, packed: Any, data: Any, *more: Any) -> None:
        _, _, *values = more  # two hooks, then the arguments
        EMULATOR.launch(function, self.source, self.metadata, (x, y, z), values)


class EmulatorDriver:
    """All that Triton's runtime asks of a driver."""

    utils = _Utils()
    launcher_cls = _Launcher

    @staticmethod
    def is_active() -> bool:
        return True

    @staticmethod
    def get_current_device() -> int:
        return 0

    @staticmethod
    def set_current_device(device: int) -> None:
        pass

    @staticmethod
    def get_current_stream(device: int) -> int:
        return 0

    @staticmethod
    def get_current_target() -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    @staticmethod
    def get_active_torch_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def map_python_to_cpp_type(kind: str) -> str:
        return kind


def install(cache: Path) -> Emulator:
    """Make the emulator the device of Triton in this process.

    Args:
        cache: folder for compiled kernels: no other process may take PTX for a cubin.
    """
    if knobs.runtime.interpret:
        raise EmulatorError("TRITON_INTERPRET is set: kernels would run in Triton's interpreter, not compiled")
    # Not through the environment, which processes that compile for a device inherit.
    knobs.propagate_env = False
    knobs.cache.dir = str(cache)
    knobs.propagate_env = True
    CUDABackend.make_cubin = lambda self, ptx, metadata, options, capability: ptx.encode()
    active_driver.set_active(EmulatorDriver())
    return EMULATOR
