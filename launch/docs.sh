#!/usr/bin/env bash
# Builds the documentation site: installs Sphinx into .venv-docs, which nothing else uses, and runs docs/site/build.py.
# Idempotent as launch/install.sh is.
set -euo pipefail
cd "$(dirname "$0")/.."
STACK=default
. launch/packages.sh

venv=.venv-docs lock=requirements-docs.lock
stamp=$venv/.installed
want=$(cat "$lock" launch/docs.sh launch/packages.sh | sha256sum | cut -d' ' -f1)
if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
    uv=$(find_uv)
    python=$(find_python sys) || fail "Python ${versions// / or } is needed; set PYTHON=/path/to/python${versions%% *}"
    echo "docs: $venv from $lock"
    "$uv" venv --quiet --clear --python "$python" "$venv"
    "$uv" pip sync --quiet --python "$venv/bin/python" --require-hashes "$lock"
    echo "$want" >"$stamp"
fi
exec "$venv/bin/python" docs/site/build.py "$@"
