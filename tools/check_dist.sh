#!/usr/bin/env bash
# Build wheels and sdists of both packages, install the wheels outside the clone and import them from there.
#
# These are the files of the working tree, without an environment of their own; `make dist` builds those of a release.
set -euo pipefail
python=$(command -v "${PYTHON:-python3}")
[[ $python == */* && $python != /* ]] && python=$PWD/$python  # this script changes the folder
here=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Without isolation nobody fetches a compiler.
(cd "$here/kernels" && "$python" -c 'import sys; from compile_kernels import compiler; sys.exit(compiler() is None)') \
    || export NEMOTRON_FP8_NATIVE=0
for package in "$here/kernels" "$here"; do
    "$python" -m build --no-isolation --outdir "$work/dist" "$package" >"$work/build.log" 2>&1 \
        || { cat "$work/build.log"; exit 1; }
done
# Dependencies come from the existing environment, the packages themselves only from the wheels.
"$python" -m pip install --quiet --no-deps --target "$work/site" "$work"/dist/*.whl
mkdir "$work/elsewhere"
cd "$work/elsewhere"
PYTHONPATH="$work/site" "$python" - "$work/site" <<'PY'
import os
import sys
from importlib import metadata
from pathlib import Path

import nemotron_fp8
import nemotron_fp8_kernels

site = Path(sys.argv[1]).resolve()
for module in (nemotron_fp8, nemotron_fp8_kernels):
    home = Path(module.__file__).resolve()
    assert site in home.parents, f"{module.__name__} came from {home}"
    assert (home.parent / "py.typed").is_file(), f"{module.__name__} ships no py.typed"
    assert metadata.version(module.__name__) == nemotron_fp8.__version__, f"{module.__name__} has another version"
assert "torch" not in sys.modules, "importing nemotron_fp8 imported torch"
assert nemotron_fp8.quantize_repo and nemotron_fp8.Recipe()

from nemotron_fp8_kernels import native

assert native.load() or os.environ.get(native.SWITCH) == "0", "the wheel has no compiled kernels for this machine"
PY
PYTHONPATH="$work/site" "$python" -m nemotron_fp8 --version
echo "wheels and sdists of both packages: built, installed outside the clone, imported"
