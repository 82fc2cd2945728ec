"""Judge a result by vLLM's own loader, without a forward: the callers' end of ``vllm_host.py``.

``python -m tests.families.in_vllm SOURCE RESULT`` prints the verdict on a pair of folders, and
``python -m tests.families.in_vllm --names SOURCE`` how vLLM calls the modules of a checkpoint.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.inference.in_vllm import ROOT, EngineRefusedError, host

if TYPE_CHECKING:
    from tests.inference.in_vllm import Host

# Absolute, because the host starts in a folder of its own; not resolved, because the link is the environment.
VLLM_PYTHON = Path(os.environ.get("VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python")).absolute()


class Judge:
    """A host of vLLM that is started when first asked, asked again and again, and replaced when it ends."""

    def __init__(self, python: Path = VLLM_PYTHON) -> None:
        self._python = python
        self._stack = contextlib.ExitStack()
        self._host: Host | None = None

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the host."""
        self._host = None
        self._stack.close()

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """Put a job to the host.

        Raises:
            EngineRefusedError: the job ended without an answer: by a signal, or by running out of time.
        """
        if self._host is None:
            home = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="families-vllm-"))
            running = host(self._python, Path(home) / "log.txt", module="tests.families.vllm_host")
            self._host = self._stack.enter_context(running)
        try:
            return self._host.ask(job)
        except BrokenPipeError:
            self.close()
            raise

    def check(self, source: Path, result: Path) -> dict[str, Any]:
        """Return the verdict on ``result`` as ``vllm_host.judge`` describes it."""
        try:
            return self.ask({"source": str(source.absolute()), "result": str(result.absolute())})
        except EngineRefusedError as refusal:
            # Which of the two did that? A source that loads twice is not to blame.
            alone = source if result.absolute() != source.absolute() else None
            if alone is None or self.check(alone, alone)["verdict"] == "source":
                return {"verdict": "source", "detail": [str(refusal).strip()]}
            return {"verdict": "refused", "detail": [str(refusal).strip()]}

    def names(self, source: Path) -> dict[str, Any]:
        """Return how vLLM calls the modules of a plain checkpoint, as ``vllm_host.names`` describes it."""
        return self.ask({"names": str(source.absolute())})


_judges: list[Judge] = []


def check(source: Path, result: Path) -> dict[str, Any]:
    """Return the verdict on ``result``; the host is started by the first call and ends with this process."""
    if not _judges:
        _judges.append(Judge())
        atexit.register(_judges[0].close)
    return _judges[0].check(source, result)


def main() -> None:
    """Print the answer to the command line as JSON."""
    parser = argparse.ArgumentParser(description="Judge a result by vLLM's own loader.")
    parser.add_argument("--names", action="store_true", help="print how vLLM calls the modules of SOURCE")
    parser.add_argument("source", type=Path)
    parser.add_argument("result", type=Path, nargs="?")
    given = parser.parse_args()
    with Judge() as judge:
        if given.names:
            answer = judge.names(given.source)
        elif given.result is None:
            parser.error("a result is needed, or --names")
        else:
            answer = judge.check(given.source, given.result)
        print(json.dumps(answer, indent=2))


if __name__ == "__main__":
    main()
