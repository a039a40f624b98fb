#!/usr/bin/env bash
# Builds the source distribution and, from that, the wheel into dist/; installs the wheel with what it asks for in a fresh
# environment, outside this folder; and measures the demo model there.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
hatchling=$(grep -o '^hatchling==[^ ]*' "$root/requirements/dev.txt")

python3 -m venv "$work/build"
"$work/build/bin/python" -m pip install --quiet --disable-pip-version-check --only-binary=:all: build==1.3.0 "$hatchling"
rm -rf "$root/dist"
"$work/build/bin/python" -m build --no-isolation --outdir "$root/dist" "$root"

python3 -m venv "$work/fresh"
for wheel in "$root"/dist/*.whl; do
    "$work/fresh/bin/python" -m pip install --quiet --disable-pip-version-check "$wheel[gguf]"
done
cd "$work"
fresh/bin/abliterate --version
model=$(fresh/bin/python "$root/scripts/demo_model.py" qwen)
fresh/bin/abliterate eval "$model" --limit 4 --max-new-tokens 16 --judge rules --no-control
