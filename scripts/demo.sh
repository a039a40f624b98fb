#!/bin/sh
# The entry of the Docker image: `demo` runs the whole job on a small model; anything else goes to abliterate.
set -eu
if [ "${1-}" = demo ]; then
    model=$(python "$(dirname "$0")/demo_model.py" qwen)
    exec abliterate run "$model" --out /out/demo --overwrite
fi
exec abliterate "$@"
