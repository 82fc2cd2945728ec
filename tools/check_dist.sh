#!/usr/bin/env bash
# Build wheel and sdist, install the wheel outside the clone and import it from there.
set -euo pipefail
python=$(command -v "${PYTHON:-python3}")
[[ $python == */* && $python != /* ]] && python=$PWD/$python  # this script changes the folder
here=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Without isolation nobody fetches a compiler.
(cd "$here" && "$python" -c 'import sys; from tools.compile_kernels import compiler; sys.exit(compiler() is None)') \
    || export NEMOTRON_FP8_NATIVE=0
"$python" -m build --no-isolation --outdir "$work/dist" "$here" >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
wheel=$(ls "$work"/dist/*.whl)
sdist=$(ls "$work"/dist/*.tar.gz)
# Dependencies come from the existing environment, the package itself only from the wheel.
"$python" -m pip install --quiet --no-deps --target "$work/site" "$wheel"
mkdir "$work/elsewhere"
cd "$work/elsewhere"
PYTHONPATH="$work/site" "$python" - "$work/site" <<'PY'
import os
import sys
from pathlib import Path

import nemotron_fp8
import nemotron_fp8_kernels

site = Path(sys.argv[1]).resolve()
for module in (nemotron_fp8, nemotron_fp8_kernels):
    home = Path(module.__file__).resolve()
    assert site in home.parents, f"{module.__name__} came from {home}"
    assert (home.parent / "py.typed").is_file(), f"{module.__name__} ships no py.typed"
assert "torch" not in sys.modules, "importing nemotron_fp8 imported torch"
assert nemotron_fp8.quantize_repo and nemotron_fp8.Recipe()

from nemotron_fp8_kernels import native

assert native.load() or os.environ.get(native.SWITCH) == "0", "the wheel has no compiled kernels for this machine"
PY
PYTHONPATH="$work/site" "$python" -m nemotron_fp8 --version
tar -tzf "$sdist" >"$work/listing"
grep -q '/kernels/nemotron_fp8_kernels/reference.py$' "$work/listing"
echo "wheel and sdist: built, installed outside the clone, imported"
