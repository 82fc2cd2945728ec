"""Lines of a made-up run on an H100, with the operations that the stages measure."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu import cases
from benchmarks.gpu.steps import kernels, peers, sweep, tests
from benchmarks.gpu.timing import ROOFS

Line = dict[str, Any]

CIRCUMSTANCES = {
    "run": 4,
    "device": "NVIDIA H100 80GB HBM3",
    "driver": "580.1",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "torchao": "0.18.0",
    "commit": "0123456789ab",
    "clocks": "not locked",
    "sm_clock_limit_mhz": 1980,
    "memory_clock_mhz": 2619,
}


def figure(stage: str, operation: str, shape: str, elements: int, granularity: str, floor: float, rate: float) -> Line:
    """Return the line of a time at ``rate`` bytes per second."""
    seconds = floor * elements / rate
    return {
        "stage": stage,
        "operation": operation,
        "shape": shape,
        "dtype": "float32" if operation.endswith("float32") or stage == "float32" else "bfloat16",
        "granularity": granularity,
        "elements": elements,
        "samples": 15 if granularity != "-" else 9,
        "seconds": seconds,
        "seconds_least": seconds,
        "seconds_most": seconds,
        "floor_bytes_per_element": floor,
        "elements_per_second": elements / seconds,
        "bytes_per_second": rate,
    }


def roofs(stage: str, shape: str, elements: int, rate: float) -> list[Line]:
    """Return one line per roof kernel; the last is the fastest."""
    return [
        figure(stage, f"2:1 roof {tile}, {warps} warps{number}", shape, elements, "-", 3, rate * (0.9 + number / 30))
        for number, (tile, warps, *_) in enumerate(ROOFS)
    ]


def whole_run() -> list[Line]:
    """Return the lines of all stages: our kernels reach 96% of the roof, torch.compile 80%."""
    lines: list[Line] = [{"stage": "environment", "case": "environment"}]
    for name, (rows, columns) in cases.SHAPES.items():
        n = rows * columns
        lines += roofs("kernels", name, n, 2.9e12)
        for granularity in kernels.GRANULARITIES:
            floor = kernels.FLOOR[granularity]
            lines.append(figure("kernels", "ours", name, n, granularity, floor, 0.96 * 3e12))
        lines.append(figure("kernels", "device copy", name, n, "-", 4, 2.8e12))
        lines += roofs("kernels", name, n, 3e12)
        lines += roofs("sweep", name, n, 3e12)
        lines.append(figure("sweep", sweep.OURS, name, n, "block", 3, 2.4e12))
        lines.append(figure("sweep", "ours, 16 warps", name, n, "block", 3, 2.7e12))
    for name in cases.PEERS:
        n = cases.SHAPES[name][0] * cases.SHAPES[name][1]
        lines += roofs("peers", name, n, 3e12)
        for granularity in kernels.GRANULARITIES:
            floor = kernels.FLOOR[granularity]
            lines.append(figure("peers", peers.OURS, name, n, granularity, floor, 2.4e12))
            lines.append(figure("peers", "torch.compile", name, n, granularity, floor, 2.0e12))
        lines.append(figure("peers", "torchao", name, n, "block", 3, 1.2e12))
    for name, (rows, columns) in cases.RAGGED.items():
        lines += [*roofs("kernels", name, rows * columns, 3e12)]
        lines.append(figure("kernels", "ragged", name, rows * columns, "channel", 3, 1.5e12))
    lines.append(figure("kernels", "at odd addresses", cases.ODD, 1 << 26, "channel", 3, 1.5e12))
    for name, (rows, columns) in cases.FLOAT32.items():
        lines += [line | {"dtype": "float32"} for line in roofs("kernels", name, rows * columns, 3e12)]
        lines.append(figure("kernels", "ours, float32", name, rows * columns, "channel", 5, 2.9e12))
    for name, (count, size) in cases.LISTS.items():
        lines += roofs("lists", name, count * size, 3e12)
        lines.append(figure("lists", "quantize_many", name, count * size, "tensor", 3, 2.4e12))
        lines.append(figure("lists", "quantize in turn", name, count * size, "tensor", 3, 1.2e12))
        lines.append({"stage": "lists", "host": "quantize_many, first", "host_seconds": 0.003, "shape": name})
        lines.append({"stage": "lists", "host": "quantize_many, again", "host_seconds": 0.001, "shape": name})
    lines += [{"stage": "bytes", "check": "bytes of every kernel", "compared": 100, "different": 0}] * 3
    lines += [{"stage": "kernels", "check": "bytes beside the timings", "compared": 7, "different": 0}]
    for stage, suite in tests.SUITES.items():
        counts = {"passed": 200, "failed": 0, "skipped": 4, "exit_code": 0}
        lines.append({"stage": stage, "check": suite} | counts)
        lines.append({"stage": stage, "check": suite, "test": "a", "outcome": "passed"})
    rates = {"host memcpy": 25.0, "pinned H2D": 55.0, "pinned D2H": 54.0}
    lines += [{"stage": "conversion", "case": name, "gigabytes_per_second": rate} for name, rate in rates.items()]
    lines += [
        {
            "stage": "conversion",
            "case": "conversion",
            "bytes_in": 8_000_000_000,
            "shards": 4,
            "samples": 3,
            "seconds": 2.0,
            "low": 1.9,
            "high": 2.1,
            "gigabytes_per_second": 4.0,
            "of_slowest": 0.16,
            "slowest": "host memcpy",
        },
        {
            "stage": "conversion",
            "case": "profile",
            "bytes_in": 8_000_000_000,
            "seconds": 2.2,
            "undisturbed": [1.9, 2.1],
            "reserve": 0.5,
            "pin": 0.3,
            "flow": 1.2,
            "kernels": 0.01,
            "write_threads": 3.0,
            "writers": 4,
        },
    ]
    for files in (1, 2, 4):
        rate = {"gigabytes_per_second": 5.0 * files, "reserve_gigabytes_per_second": 6.0}
        lines.append({"stage": "conversion", "case": "tmpfs pwrite", "files": files, "reserved": True} | rate)
    stages = dict.fromkeys(line["stage"] for line in lines)
    lines += [{"stage": stage, "case": "exit", "code": 0} for stage in stages]
    return [line | CIRCUMSTANCES for line in lines]
