"""Cost of the malformed files: ``python -m tests.support.corpus_cost`` reads all of them (Linux).

Prints one JSON object: the slowest case, its seconds of CPU, and the peak resident memory in bytes.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from tests.support.corpus_headers import header_cases, read_header_bytes
from tests.support.corpus_json import BadJsonError, json_cases, read_json_bytes


def main() -> None:
    """Read every malformed file in this process and print what it cost."""
    slowest = (0.0, "")
    for read, cases in ((read_header_bytes, header_cases()), (read_json_bytes, json_cases())):
        for case in cases:
            file = case.make()
            started = time.process_time()
            try:
                read(file)
            except (ValueError, BadJsonError):
                slowest = max(slowest, (time.process_time() - started, case.name))
            else:
                raise SystemExit(f"accepted: {case.name}")
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    print(json.dumps({"seconds": slowest[0], "case": slowest[1], "peak_bytes": peak}))


if __name__ == "__main__":
    main()
