"""The command against the test Hub: resume, Ctrl-C and error messages."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nemotron_fp8 import Recipe
from nemotron_fp8.cli.demo import write_checkpoint as write_demo
from tests.hub.conftest import TOKEN
from tests.hub.conversion import checkpoint, convert, wanted
from tests.hub.test_hub_to_hub import contents

if TYPE_CHECKING:
    from nemotron_fp8.hub.client import HubClient
    from tests.hub_server.faults import Request
    from tests.hub_server.hub import Hub
    from tests.hub_server.server import HubServer

ROOT = Path(__file__).parents[2]


def command(server: HubServer, home: Path, *arguments: str, xet: bool = False) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "" if xet else "1",
        "MY_TOKEN": TOKEN,
    }
    environment.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    return subprocess.Popen(
        [sys.executable, "-m", "nemotron_fp8", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_command_resumes_on_another_machine(hub: Hub, server: HubServer, client: HubClient, tmp_path: Path) -> None:
    """The first run is killed as it uploads its third shard; the second has neither its home nor its cache."""
    hub.store.seed("nv/source", checkpoint(tmp_path / "source"))
    result = wanted(client, tmp_path)
    line = ("quantize", "hf://nv/source", "hf://me/target", "--private", "--token-env", "MY_TOKEN")
    process = command(server, tmp_path / "one", *line)
    uploads = 0

    def kill(request: Request) -> None:
        nonlocal uploads
        uploads += request.method == "PUT"
        if uploads == 3:
            hub.before = None
            os.kill(process.pid, signal.SIGKILL)

    hub.before = kill
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert contents(hub) == {}
    shutil.rmtree(tmp_path / "one")
    before = len(hub.log)
    process = command(server, tmp_path / "two", *line, "--cache-dir", str(tmp_path / "cache"), "--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["destination"] == "hf://me/target"
    assert "resumed with" in err
    assert TOKEN not in out + err
    assert contents(hub) == result
    assert hub.store.repo("me/target").meta["private"]
    assert sum(request.method == "PUT" for request in hub.log[before:]) < len(result)
    assert list((tmp_path / "cache").iterdir()) == []
    assert not (tmp_path / "two" / "nemotron_fp8").exists()
    assert hub.leaks() == []


@pytest.mark.parametrize("way", ["download", "upload"])
def test_ctrl_c_ends_a_wait_for_the_hub(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path, way: str
) -> None:
    """In the middle of a wait of ten minutes that the Hub asked for."""
    hub.store.seed("nv/source", checkpoint(tmp_path / "source"))
    result = wanted(client, tmp_path)
    path, skip = ("/_cdn/", 6) if way == "download" else ("/commit/", 2)
    rule = hub.faults.add("429_retry_after", path=path, skip=skip, times=None, seconds=600)
    process = command(server, tmp_path / "home", "quantize", "nv/source", "hf://me/target", "--token-env", "MY_TOKEN")
    deadline = time.monotonic() + 60
    while not rule.hits and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - begun < 30
    assert process.returncode == 130
    assert "run the same command again to resume" in err
    assert list((tmp_path / "home" / "nemotron_fp8").iterdir()) == []
    assert contents(hub) == {}
    hub.faults.clear()
    convert(client, tmp_path / "work")
    assert contents(hub) == result


def test_errors_of_the_command_say_what_to_do(hub: Hub, server: HubServer, client: HubClient, tmp_path: Path) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source"))
    hub.set_gated("nv/source")
    hub.store.create("you/target")
    hub.store.seed("nv/open", checkpoint(tmp_path / "open"))
    token = ("--token-env", "MY_TOKEN")
    for arguments, advice in (
        (("quantize", "hf://nv/source", str(tmp_path / "x"), *token), "request access"),
        (("quantize", "hf://nv/open", "hf://you/target", *token), "--pr"),
    ):
        _, err = (process := command(server, tmp_path / "home", *arguments)).communicate(timeout=120)
        assert process.returncode == 1
        assert err.count("error:") == 1
        assert advice in err
        assert TOKEN not in err


def test_neither_the_library_nor_its_help_imports_torch_or_the_client() -> None:
    program = (
        "import sys, nemotron_fp8, nemotron_fp8.cli.main as c\n"
        "nemotron_fp8.HubOptions\n"
        "try: c.cli(['quantize', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'huggingface_hub', 'triton', 'httpx', 'httpx2') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def run(server: HubServer, home: Path, *arguments: str) -> tuple[int, str, str]:
    process = command(server, home, *arguments)
    out, err = process.communicate(timeout=120)
    assert TOKEN not in out + err
    return process.returncode, out, err


def test_a_destination_without_a_token_is_refused_before_any_request(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path
) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source", 2))
    before = len(hub.log)
    code, _, err = run(server, tmp_path / "home", "quantize", "nv/source", "hf://me/target")
    assert code == 1
    assert "hf auth login" in err
    assert "--token-env" in err
    assert hub.log[before:] == []


def test_a_plan_fetches_headers_alone(hub: Hub, server: HubServer, client: HubClient, tmp_path: Path) -> None:
    """It fetches no sample either, though a local plan measures one, and it shows the size of the transfer."""
    files = checkpoint(tmp_path / "source", 3, rows=2048, columns=1024)
    hub.store.seed("nv/source", files)
    hub.set_private("nv/source")
    hub.store.repo("nv/source").set_meta(allowed=["me"])
    shards = [len(content) for name, content in files.items() if name.endswith(".safetensors")]
    for arguments in (("nv/source",), ("hf://nv/source", "--revision", "main", "--json")):
        before = len(hub.log)
        code, out, err = run(server, tmp_path / "home", "plan", *arguments, "--token-env", "MY_TOKEN")
        assert (code, err) == (0, "")
        ranges = [request.range for request in hub.log[before:] if request.path.startswith("/_cdn/")]
        assert ranges == ["bytes=0-262143"] * 3
        if "--json" not in arguments:
            assert "from the Hub" in out
            assert "--cache-dir" in out
            continue
        plan_json = json.loads(out)
        assert plan_json["fetched_bytes"] == sum(shards)
        assert plan_json["cache_bytes"] == 2 * max(shards)
        assert plan_json["seconds"] is None


def test_the_needs_of_an_evaluation_fetch_headers_alone(hub: Hub, server: HubServer, tmp_path: Path) -> None:
    """No tensor is fetched to measure the transfer, whose time is unknown."""
    write_demo(tmp_path / "source")
    hub.store.seed("nv/tiny", {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()})
    code, out, err = run(server, tmp_path / "home", "plan", "hf://nv/tiny", "--evaluate", "--json")
    assert (code, err) == (0, "")
    ranges = [request.range for request in hub.log if request.path.startswith("/_cdn/")]
    assert ranges == ["bytes=0-262143"] * len(list((tmp_path / "source").glob("*.safetensors")))
    evaluation = json.loads(out)["evaluation"]
    assert evaluation["ahead"]
    here, *_ = evaluation["predictions"]
    assert here["measured"]
    assert here["compute_seconds"] > 0
    assert here["read_seconds"] is here["seconds"] is None


def test_what_a_command_cannot_do_with_the_hub(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source", 2))
    before = len(hub.log)
    for arguments, advice in (
        (("quantize", "hf://nv/source", "--in-place"), "hf://"),
        (("quantize", "hf://source", "x"), "hf://owner/name"),
    ):
        code, _, err = run(server, tmp_path / "home", *arguments)
        assert code == 1
        assert advice in err
    assert hub.log[before:] == []


def test_the_report_of_a_repository_is_that_of_its_folder(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path
) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source", 2))
    convert(client, tmp_path / "work", target=str(tmp_path / "target"), recipe=Recipe(stats=True))
    hub.store.seed("nv/target", {path.name: path.read_bytes() for path in (tmp_path / "target").iterdir()})
    here, there = [
        run(server, tmp_path / "home", "report", place, "--json")[1]
        for place in (str(tmp_path / "target"), "hf://nv/target")
    ]
    own = {"name": "", "made": None}  # a repository has no date of one file
    assert json.loads(here) | own == json.loads(there) | own
    assert json.loads(there)["tensors"]
    code, out, _ = run(server, tmp_path / "home", "compare", str(tmp_path / "target"), "hf://nv/target")
    assert code == 0
    assert "target" in out


def test_a_folder_that_looks_like_a_repository_is_noted(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source", 2))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        code, _, err = run(server, tmp_path / "home", "quantize", "nv/source", "me/target")
        assert code == 0
        assert err.startswith("note: me/target will be a folder; for a repository on the Hub, write hf://me/target\n")
        assert (tmp_path / "me" / "target" / "config.json").exists()
        assert hub.store.find("me/target") is None
        shutil.rmtree(tmp_path / "me")
    (tmp_path / "me").mkdir()
    assert "note:" not in run(server, tmp_path / "home", "quantize", "nv/source", "me/target")[2]


def test_tensors_of_a_repository(hub: Hub, server: HubServer, client: HubClient, tmp_path: Path) -> None:
    hub.store.seed("nv/source", checkpoint(tmp_path / "source", 2))
    local = run(server, tmp_path / "home", "inspect", str(tmp_path / "source"))
    assert run(server, tmp_path / "home", "inspect", "nv/source") == local
    assert run(server, tmp_path / "home", "inspect", "hf://nv/source") == local


def test_waits_for_the_hub_are_reported(hub: Hub, server: HubServer, client: HubClient, tmp_path: Path) -> None:
    """Before a conversion begins and while it runs, because silence would look like a hang."""
    hub.store.seed("nv/source", checkpoint(tmp_path / "source", 2))
    hub.faults.add("503", path="/api/models/nv/source")
    hub.faults.add("503", path="/_cdn/", skip=3)
    code, _, err = run(server, tmp_path / "home", "quantize", "nv/source", "hf://me/target", "--token-env", "MY_TOKEN")
    assert code == 0
    assert "note: nv/source: the Hub answers 503; retrying in 1 s" in err
    assert "retrying in 1 s: nv/source: the Hub answers 503" in err


def test_an_upload_over_xet_shows_no_bars_and_no_percentage(
    hub: Hub, server: HubServer, client: HubClient, tmp_path: Path
) -> None:
    """huggingface_hub would draw four bars for each shard, and hf_xet reports no bytes."""
    hub.xet_enabled = True
    checkpoint(tmp_path / "source", 2)
    arguments = ("quantize", str(tmp_path / "source"), "hf://me/target", "--token-env", "MY_TOKEN")
    _, err = (process := command(server, tmp_path / "home", *arguments, xet=True)).communicate(timeout=120)
    assert process.returncode == 0, err
    assert any("/xet-write-token/" in request.path for request in hub.log)
    assert not any(request.method == "PUT" for request in hub.log)
    assert set(contents(hub)) >= {"config.json", "model-00001-of-00002.safetensors"}
    assert not re.search(r"Processing Files|New Data Upload|\|.*it/s|B/s[,\]]", err)
    assert not re.search(r"up #\d+ \d+%", err.replace(" 100%", ""))
