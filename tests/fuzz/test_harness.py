"""The harness catches what it looks for."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fuzz import harness
from tests.fuzz.tree import Input, Link

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT = 1.0


def fail(text: str, code: int = 1) -> None:
    """End as the command does."""
    sys.stderr.write(f"error: {text}\n")
    sys.exit(code)


def crash() -> None:
    raise KeyError("I32")


def hang() -> None:
    time.sleep(60)


def hog() -> None:
    data = bytearray(600 << 20)
    data[:: os.sysconf("SC_PAGE_SIZE")] = data[:: os.sysconf("SC_PAGE_SIZE")]  # touch every page
    fail("too late")


def die() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)  # not one that a handler of pytest reports


def half_made() -> None:
    Path("dst").mkdir()
    fail("the disk is full")


def two_errors() -> None:
    sys.stderr.write("error: one\n")
    fail("two")


def error_first() -> None:
    sys.stderr.write("error: one\nmore\n")
    sys.exit(1)


def false_success() -> None:
    fail("no", 0)


def silent() -> None:
    sys.exit(1)


def unknown_code() -> None:
    fail("no", 3)


def internal() -> None:
    fail("internal error: x")


def long_line() -> None:
    fail("x" * 30_000)


def control() -> None:
    sys.stdout.write("a\x1b[2J\n")


def direction() -> None:
    sys.stdout.write("a\u202eb\n")


def outside() -> None:
    Path("../beside").write_text("x")


def through_a_link() -> None:
    with Path("link").open("r+") as file:
        file.write("x")


PLANTED: dict[Callable[[], None], str] = {
    crash: "traceback: outside of the product KeyError: 'I32'",
    hang: "took more than 1 s",
    hog: "MiB",
    die: "ended by signal 10",
    half_made: "dst exists after exit code 1",
    two_errors: "2 error lines",
    error_first: "the error line is not the last",
    false_success: "exit code 0 with an error line",
    silent: "0 error lines",
    unknown_code: "exit code 3",
    internal: "internal error",
    long_line: "a line of 30,007 characters on stderr",
    control: r"'\x1b' on stdout",
    direction: r"'\u202e' on stdout",
    outside: "outside of the folder: open",
    through_a_link: "a file outside of the folder was changed through a link",
}


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    harness.preload()


@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.__name__)
def test_planted_fault_is_caught(tmp_path: Path, fault: Callable[[], None]) -> None:
    given = Input({"link": Link("canary")}, ["plan"], result="dst")
    limit = LIMIT if fault is hang else harness.SECONDS
    ended = harness.run(given, tmp_path / "input", limit, fault)
    wrong = harness.judge(given, tmp_path / "input", ended, limit)
    assert any(PLANTED[fault] in line for line in wrong), wrong


@pytest.mark.parametrize("command", [["--version"], ["plan", "missing"], ["plan", "--bad"], []])
def test_the_command_itself_passes(tmp_path: Path, command: list[str]) -> None:
    given = Input({}, command, result="dst")
    ended = harness.run(given, tmp_path / "input")
    assert harness.judge(given, tmp_path / "input", ended) == []
    assert ended.code == {"--version": 0, "plan": 1}.get(command[0] if command else "", 2) or "--bad" in command


@pytest.mark.fuzz
def test_a_name_makes_the_same_input_again(tmp_path: Path) -> None:
    from tests.fuzz import sweep
    from tests.fuzz.seeds import Seeds

    seeds = Seeds(tmp_path)
    for kind in sweep.FORMATS:
        first, second = (sweep.make(f"7:{kind}:3", seeds) for _ in range(2))
        assert (first.tree, first.command, first.environment) == (second.tree, second.command, second.environment)
