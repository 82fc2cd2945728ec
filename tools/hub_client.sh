#!/bin/sh
# Build an environment with one version of huggingface_hub, on top of the project's environment.
#
#   tools/hub_client.sh VERSION VENV
#
# PYTHON is the interpreter of the project's environment. Only the client, its dependencies and hf_xet are installed;
# torch and the others come from that environment.
set -eu

version=$1
venv=$2
rm -rf "$venv"
"$PYTHON" -m venv "$venv"
"$venv/bin/python" -m pip --disable-pip-version-check --quiet install "huggingface_hub==$version" hf_xet
# Paths of a .pth file come after the packages of the environment itself.
"$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
found=$("$venv/bin/python" -c 'import huggingface_hub, torch; print(huggingface_hub.__version__)')
[ "$found" = "$version" ] || { echo "error: huggingface_hub $found instead of $version" >&2; exit 1; }
touch "$venv/.installed"
