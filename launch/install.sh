#!/usr/bin/env bash
# Installs everything the project runs on: the default stack into .venv, the oldest that is promised
# (STACK=minimum) into .venv-minimum. Idempotent: the stamp holds the hash of what was installed, so a second call
# returns at once and a changed lock installs again.
set -euo pipefail
cd "$(dirname "$0")/.."

case ${STACK:-default} in
default) venv=.venv lock=requirements.lock versions="3.12 3.13" ;;
minimum) venv=.venv-minimum lock=requirements-minimum.lock versions="3.11" ;;
*)
    echo "launch/install.sh: STACK=$STACK is not known; it is default or minimum" >&2
    exit 2
    ;;
esac

stamp=$venv/.installed
want=$(cat "$lock" requirements-megablocks.lock launch/install.sh | sha256sum | cut -d' ' -f1)
[ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && exit 0

# Prints a Python of a fitting version: PYTHON if it is set, else one on PATH, else pyenv's, whose shims need not
# lead to it.
find_python() {
    local version candidate
    for version in $versions; do
        for candidate in ${PYTHON:-python$version python3 ${PYENV_ROOT:-~/.pyenv}/versions/$version.*/bin/python}; do
            if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; then
                command -v "$candidate"
                return
            fi
        done
    done
    return 1
}

# uv: the one on PATH, else a private copy that touches nothing outside this folder.
uv=$(command -v uv || true)
if [ -z "$uv" ]; then
    uv=$PWD/.cache/tools/bin/uv
    if [ ! -x "$uv" ]; then
        echo "install: uv into .cache/tools"
        python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
            --target .cache/tools uv 2>.cache-uv.log || { cat .cache-uv.log >&2; exit 1; }
        rm -f .cache-uv.log
    fi
fi

# Where there is none, uv fetches one, if it can.
python=$(find_python) || { [ -z "${PYTHON:-}" ] && python=$("$uv" python find --quiet "${versions%% *}" 2>/dev/null ||
    { "$uv" python install --quiet "${versions%% *}" && "$uv" python find "${versions%% *}"; } 2>/dev/null); } || {
    echo "launch/install.sh: Python ${versions// / or } is needed; set PYTHON=/path/to/python${versions%% *}" >&2
    exit 2
}

echo "install: $venv from $lock (some 270 packages, 7 GB; a minute or two)"
"$uv" venv --quiet --allow-existing --python "$python" "$venv"
# Bytecode now, once, rather than in every rank's first start, where PYTHONDONTWRITEBYTECODE may even forbid it.
"$uv" pip sync --quiet --compile-bytecode --python "$venv/bin/python" --require-hashes "$lock"

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
PYTHONPATH=$standin "$uv" pip install --quiet --compile-bytecode --python "$venv/bin/python" --no-deps \
    --no-build-isolation --require-hashes -r requirements-megablocks.lock

echo "$want" >"$stamp"
