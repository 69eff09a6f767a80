#!/usr/bin/env bash
# Install the libraries that `sae bench` compares with, each at the version the published figures are for, into an
# environment of their own: they need another transformer-lens than this package.
#
#     scripts/bench/install_peers.sh [folder]      default: .venv-peers
#
# Asked for together they never resolve: SAELens comes first, then the others without their requirements, with those
# few that they import and SAELens has not brought.
set -eu
folder=${1:-.venv-peers}
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet torch==2.13.0 sae-lens==6.54.12
"$folder/bin/python" -m pip install --quiet --no-deps eai-sparsify==1.3.3 dictionary-learning==0.1.0 natsort==8.4.0 schedulefree==1.4.1 zstandard==0.25.0
