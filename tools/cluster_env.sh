#!/bin/sh
# Build the environment of `make test-cluster` and benchmarks/measure/cluster.py; print time and size.
#
#   tools/cluster_env.sh VENV
#
# It is separate because Ray is large and needs a Python for which it has wheels (set PYTHON).
set -eu

venv=$1
here=$(dirname "$0")/..
started=$(date +%s)

rm -rf "$venv"
"${PYTHON:-python3}" -m venv "$venv"
# Packages compile on first import; compiling all of them takes longer than installing them.
install="$venv/bin/python -m pip --disable-pip-version-check --quiet install --no-compile"
$install --constraint "$here/constraints.txt" --constraint "$here/tests/cluster/constraints-ray.txt" \
    'ray[client]' torch safetensors huggingface_hub pydantic click pyyaml numpy obstore 'moto[s3,server]' pytest hypothesis
# Its dependencies are above, without triton, which its CPU path does not import.
$install --no-deps --editable "$here/kernels" --editable "$here"
"$venv/bin/python" -c 'import nemotron_fp8, ray, torch'
touch "$venv/.installed"
echo "$venv: $(($(date +%s) - started)) s, $(du -sm "$venv" | cut -f1) MiB"
