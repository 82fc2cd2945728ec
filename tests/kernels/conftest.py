"""Fixtures of the kernel tests: Triton's interpreter, or the device with NEMOTRON_FP8_TEST_GPU=1 (`make gpu`).

triton reads the choice when it is first imported, so this file makes it during collection.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from types import ModuleType

ON_GPU = os.environ.get("NEMOTRON_FP8_TEST_GPU") == "1"
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

# The tensors are small: a second thread per operation costs more time than it saves.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # The interpreter computes with numpy, which warns when floats overflow to Inf. The overflow itself is correct.
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"))
    if not (ON_GPU and torch.cuda.is_available()):
        reason = "needs a CUDA device and NEMOTRON_FP8_TEST_GPU=1"
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def triton_ops() -> ModuleType:
    """Return the Triton path: interpreted on CPU tensors with a correct cast, or compiled."""
    from nemotron_fp8_kernels.gpu import ops

    if ops.INTERPRETED:
        from tests.kernels.interpreter import install

        install()
    return ops


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if ON_GPU else "cpu"
