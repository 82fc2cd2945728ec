"""Settings of the whole suite, and fixtures that several files use."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests.support.checkpoints import model, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

# Whatever a script runs in its background has SIGINT ignored, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: a machine that others use too must not fail a test. The temporary folder of a test is shared by
# its examples; each makes its own folder in it. Half of the usual examples, so that the suite stays quick;
# `--hypothesis-profile=thorough` tries twenty times as many.
CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
settings.register_profile("suite", deadline=None, suppress_health_check=CHECKS, max_examples=50)
settings.register_profile("thorough", deadline=None, suppress_health_check=CHECKS, max_examples=1000)
settings.load_profile("suite")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small decoder in two shards, with what usually stands beside one."""
    return write_checkpoint(
        tmp_path / "source",
        model(),
        metadata={f"model-{i:05d}-of-00002.safetensors": {"format": "pt"} for i in (1, 2)},
        index_metadata={"total_parameters": 12},
        side={"tokenizer.json": b"{}", "LICENSE": b"free"},
    )


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    """Where a result can go; alone in its folder."""
    (tmp_path / "there").mkdir()
    return tmp_path / "there" / "result"
