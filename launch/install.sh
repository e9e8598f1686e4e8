#!/usr/bin/env bash
# Installs everything the project runs on into .venv. Idempotent: the stamp holds the hash of what
# was installed, so a second call returns at once and a changed lock installs again.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || python=python3
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
    echo "launch/install.sh: Python 3.11 is needed; set PYTHON=/path/to/python3.11" >&2
    exit 2
}

stamp=.venv/.installed
want=$(cat requirements.lock requirements-megablocks.lock launch/install.sh | sha256sum | cut -d' ' -f1)
[ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && exit 0

# uv: the one on PATH, else a private copy that touches nothing outside this folder.
uv=$(command -v uv || true)
if [ -z "$uv" ]; then
    uv=$PWD/.cache/tools/bin/uv
    if [ ! -x "$uv" ]; then
        echo "install: uv into .cache/tools"
        "$python" -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
            --target .cache/tools uv 2>.cache-uv.log || { cat .cache-uv.log >&2; exit 1; }
        rm -f .cache-uv.log
    fi
fi

echo "install: .venv from requirements.lock (some 270 packages, 7 GB; a minute or two)"
"$uv" venv --quiet --allow-existing --python "$python" .venv
"$uv" pip sync --quiet --python .venv/bin/python --require-hashes requirements.lock

# MegaBlocks' build asks a GPU for its compute capability before it compiles. A stand-in for torch,
# seen by that build alone, makes it install as pure Python; train/model/megablocks_ops.py supplies the
# operations. A compiled megablocks_ops, where there is one, takes precedence at run time.
echo "install: MegaBlocks as pure Python"
standin=$(mktemp -d)
trap 'rm -rf "$standin"' EXIT
mkdir -p "$standin/torch/utils"
echo '__version__ = "2.7.0"' >"$standin/torch/__init__.py"
: >"$standin/torch/utils/__init__.py"
cat >"$standin/torch/utils/cpp_extension.py" <<'PY'
CUDA_HOME = BuildExtension = CUDAExtension = None
PY
PYTHONPATH=$standin "$uv" pip install --quiet --python .venv/bin/python --no-deps \
    --no-build-isolation --require-hashes -r requirements-megablocks.lock

echo "$want" >"$stamp"
