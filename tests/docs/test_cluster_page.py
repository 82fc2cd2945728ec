"""The batch file and the manifest of docs/cluster.md, for systems that are not available here."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cluster.md"
POD = {"containers", "volumes"}
"""Fields of a Kubernetes pod spec in the manifest."""
GROUP = {"rayStartParams", "template", "serviceType", "headService", "enableIngress"}
WORKERS = GROUP - {"serviceType", "headService", "enableIngress"} | {
    "groupName",
    "replicas",
    "minReplicas",
    "maxReplicas",
    "numOfHosts",
    "scaleStrategy",
}
SPEC = {
    "headGroupSpec",
    "workerGroupSpecs",
    "rayVersion",
    "enableInTreeAutoscaling",
    "autoscalerOptions",
    "headServiceAnnotations",
    "suspend",
}
"""The fields of KubeRay's ray.io/v1: HeadGroupSpec, WorkerGroupSpec, RayClusterSpec (raycluster_types.go)."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("language", ["sh", "bash"])
def test_the_shell_can_read_it(language: str) -> None:
    assert blocks(language)
    for block in blocks(language):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), block


def test_the_batch_file_asks_for_what_it_uses() -> None:
    """Slurm options come before the first command, or Slurm ignores them; there are two nodes."""
    (script,) = blocks("bash")
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    commands = [i for i, line in enumerate(lines) if line and not line.startswith("#")]
    asked = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert max(asked) < min(commands)
    assert "#SBATCH --nodes=2" in lines
    assert "SLURM_CPUS_PER_TASK" in script
    assert any(line.startswith("#SBATCH --cpus-per-task=") for line in lines)


def test_two_batch_jobs_fit_on_a_node() -> None:
    """Ports depend on the job: a head ends if its port, or that of its client server (10001 by default), is taken."""
    (script,) = blocks("bash")
    (head,) = re.findall(r"ray start --head(?:.*\\\n)*.*", script)
    for option in ("--port", "--ray-client-server-port"):
        (value,) = re.findall(rf'{option}="([^"]+)"', head)
        assert value.startswith("$"), "the same for every job"


def test_the_manifest_has_fields_that_kuberay_knows() -> None:
    (text,) = blocks("yaml")
    manifest: dict[str, Any] = yaml.safe_load(text)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayCluster")
    spec = manifest["spec"]
    assert set(spec) <= SPEC
    assert set(spec["headGroupSpec"]) <= GROUP
    for group in spec["workerGroupSpecs"]:
        assert set(group) <= WORKERS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        # KubeRay passes these as strings and rejects numbers.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        assert set(pod) == POD
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/shared"}
            assert container["resources"]["limits"] == container["resources"]["requests"]
