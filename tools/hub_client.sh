#!/bin/sh
# Build an environment with one version of huggingface_hub in front of everything else of the project's environment.
#
#   tools/hub_client.sh VERSION VENV
#
# PYTHON is the interpreter of the project's environment. Only the client, what it needs, and hf_xet are installed;
# torch and the rest come from there.
set -eu

version=$1
venv=$2
rm -rf "$venv"
"$PYTHON" -m venv "$venv"
"$venv/bin/python" -m pip --disable-pip-version-check --quiet install "huggingface_hub==$version" hf_xet
# A .pth file is read in order after the environment's own packages: those go first.
"$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
found=$("$venv/bin/python" -c 'import huggingface_hub, torch; print(huggingface_hub.__version__)')
[ "$found" = "$version" ] || { echo "error: huggingface_hub $found instead of $version" >&2; exit 1; }
touch "$venv/.installed"
