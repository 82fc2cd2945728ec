#!/bin/sh
# Build the environment that `make test-cluster` and benchmarks/measure/cluster.py run in, and say what it took.
#
#   tools/cluster_env.sh VENV
#
# It is apart from the others because Ray is large and wants a Python that it has wheels for (set PYTHON).
set -eu

venv=$1
here=$(dirname "$0")/..
started=$(date +%s)

rm -rf "$venv"
"${PYTHON:-python3}" -m venv "$venv"
# Packages compile on first import: to compile all of them takes longer than to install them.
install="$venv/bin/python -m pip --disable-pip-version-check --quiet install --no-compile"
$install --constraint "$here/constraints.txt" --constraint "$here/tests/cluster/constraints-ray.txt" \
    'ray[client]' torch safetensors huggingface_hub pydantic click pyyaml numpy pytest hypothesis
# Its own needs are above, but for triton, which its CPU path does not import.
$install --no-deps --editable "$here"
"$venv/bin/python" -c 'import nemotron_fp8, ray, torch'
touch "$venv/.installed"
echo "$venv: $(($(date +%s) - started)) s, $(du -sm "$venv" | cut -f1) MiB"
