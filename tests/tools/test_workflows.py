"""The workflows parse, run targets of the Makefile only, and hold no secret."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.commands import targets

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PINNED = re.compile(r"^\s*- uses: [\w-]+/[\w-]+@[0-9a-f]{40}  # v\d+(\.\d+){2}$")
TOOLS = "sudo apt-get update && sudo apt-get install --yes strace"
"""The one command of a workflow that is no target: what the machine of a suite lacks."""


def jobs(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"])


def commands(job: dict[str, Any]) -> list[str]:
    """Return the commands of a job, once for each entry of its matrix."""
    matrix: dict[str, list[str]] = job.get("strategy", {}).get("matrix", {})
    runs = [step["run"] for step in job["steps"] if "run" in step]
    found = []
    for values in itertools.product(*matrix.values()):
        chosen = dict(zip(matrix, values, strict=True))
        found += [re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda name, of=chosen: of[name[1]], run) for run in runs]
    return found


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_targets_that_exist(path: Path) -> None:
    for name, job in jobs(path).items():
        for command in commands(job):
            words = command.split()
            wanted = [word for word in words[1:] if "=" not in word]
            assert command == TOOLS or (words[0] == "make" and len(wanted) == 1), f"{name}: {command}"
            assert command == TOOLS or wanted[0] in targets(), f"{name}: no such target: {wanted[0]}"


def test_ci_runs_all_that_the_script_of_ci_runs() -> None:
    """With the same shares."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    wanted = set(re.findall(r"^make (\S+(?: [A-Z]+=\S+)?)", script, re.MULTILINE))
    assert len(wanted) > 5
    (workflow,) = [path for path in WORKFLOWS if path.name == "ci.yml"]
    run = {command for job in jobs(workflow).values() for command in commands(job)}
    assert {f"make {command} PYTHON=python" for command in wanted} <= run


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_and_rights_are_least(path: Path) -> None:
    """By their commit, since a tag of an action can be moved; only the job that publishes may ask for an identity."""
    text = path.read_text(encoding="utf-8")
    uses = [line for line in text.splitlines() if "uses:" in line]
    assert [line for line in uses if not PINNED.fullmatch(line)] == []
    assert "secrets." not in text
    assert yaml.safe_load(text)["permissions"] == {"contents": "read"}
    for name, job in jobs(path).items():
        assert job.get("permissions", {}) == ({"id-token": "write"} if name == "publish" else {})
        assert job["timeout-minutes"] <= 360
        for step in job["steps"]:
            if "checkout" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] is False


def test_what_is_published_passed_all_checks() -> None:
    (path,) = [path for path in WORKFLOWS if path.name == "release.yml"]
    found = jobs(path)
    assert found["publish"]["needs"] == ["release", "kernels"]
    assert commands(found["publish"]) == []
    assert "make release TAGGED=1 PYTHON=python3.12" in commands(found["release"])
