#!/usr/bin/env bash
# Writes requirements/dev.txt: one version of everything that development needs, with the hashes of its files. Needs uv.
#
#   scripts/lock.sh                what is locked stays; what pyproject.toml adds is added
#   scripts/lock.sh --upgrade      newest versions that the ranges allow
set -euo pipefail
cd "$(dirname "$0")/.."
exec uv pip compile pyproject.toml requirements/dev.in --extra dev --constraint constraints.txt \
    --override requirements/without-torch.txt --no-emit-package torch --universal --python-version 3.11 \
    --generate-hashes --no-annotate --custom-compile-command scripts/lock.sh --output-file requirements/dev.txt \
    --quiet "$@"
