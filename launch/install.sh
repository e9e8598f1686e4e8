#!/usr/bin/env bash
# Installs everything the project runs on: the default stack into .venv, the oldest that is promised
# (STACK=minimum) into .venv-minimum. Options, in any combination:
#   --core          only what trains, checks and benchmarks: no MLflow, evaluation, exports, charts, Parquet or stores
#   --system-torch  keeps torch, triton and NCCL of PYTHON or the Python on PATH, for example a vendor's container
#   --wheels DIR    takes every package from a folder made by launch/wheels.sh, without a network, with pip;
#                   includes --system-torch
# Idempotent: the stamp holds the hash of what was installed and how, so a second call returns at once and a changed
# lock or option installs again. Without options, those of the existing environment hold; delete it to be rid of them.
set -euo pipefail
called_from=$PWD
cd "$(dirname "$0")/.."
. launch/packages.sh

kept=$venv/.options # the Python, then the options
if [ $# = 0 ] && [ -f "$kept" ]; then
    mapfile -t lines <"$kept"
    PYTHON=${PYTHON:-${lines[0]}}
    set -- "${lines[@]:1}"
fi
options=() core='' system_torch='' wheels=''
while [ $# -gt 0 ]; do
    case $1 in
    --core) core=yes options+=(--core) ;;
    --system-torch) system_torch=yes options+=(--system-torch) ;;
    --wheels)
        wheels=$(cd "$called_from" && realpath -- "${2:-}" 2>/dev/null) && [ -f "$wheels/core.txt" ] ||
            fail "--wheels: ${2:-} is not a folder of wheels; make wheels WHEELS=DIR makes one"
        system_torch=yes options+=(--wheels "$wheels")
        shift
        ;;
    *) fail "$1 is not known; the options are --core, --system-torch and --wheels DIR" ;;
    esac
    shift
done
list=$wheels/$([ "$core" ] && echo core || echo full).txt
if [ "$wheels" ]; then
    [ -f "$list" ] || fail "--wheels: $wheels holds only the core; add --core"
    versions=$(<"$wheels/python")
fi

# The Python and, with --system-torch, its torch.
python=''
if [ "$system_torch" ]; then
    python=$(find_python torch) || fail "--system-torch: no Python ${versions// / or } with torch${PYTHON:+: $PYTHON}; \
set PYTHON=/path/to/the/python that has it"
    torch=$("$python" -c 'from importlib.metadata import version; print(version("torch"))')
    oldest=$(sed -n 's/^ *"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)
    [ "$(printf '%s\n' "$oldest" "$torch" | sort -V | head -1)" = "$oldest" ] ||
        fail "--system-torch: $python has torch $torch; $oldest or newer is needed"
fi

stamp=$venv/.installed
facts="${options[*]} $python ${torch:-}"
want=$({ echo "$facts" && cat "$lock" requirements-megablocks.lock launch/install.sh launch/packages.sh \
    ${options:+pyproject.toml} ${wheels:+"$list"}; } | sha256sum | cut -d' ' -f1)
[ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && exit 0

if [ -z "$wheels" ]; then
    uv=$(find_uv)
    # Where there is no Python, uv fetches one, if it can.
    python=${python:-$(find_python sys)} || { [ -z "${PYTHON:-}" ] &&
        python=$("$uv" python find --quiet "${versions%% *}" 2>/dev/null || {
            "$uv" python install --quiet "${versions%% *}" && "$uv" python find "${versions%% *}"
        } 2>/dev/null); } ||
        fail "Python ${versions// / or } is needed; set PYTHON=/path/to/python${versions%% *}"
fi

# Makes the environment see the torch of the system, also where that lies in an environment itself.
keep_system_torch() {
    "$venv/bin/python" -c 'import sys; from importlib.util import find_spec; sys.exit(find_spec("torch") is None)' ||
        "$python" -c 'from importlib.util import find_spec; from pathlib import Path
print(Path(find_spec("torch").origin).parents[1])' >"$(echo "$venv"/lib/python*/site-packages)/system_torch.pth"
    echo "install: keeping torch $torch of $python"
}

# Bytecode now, once, rather than in every rank's first start, where PYTHONDONTWRITEBYTECODE may even forbid it.
if [ "$wheels" ]; then
    echo "install: $venv from $list"
    "$python" -m venv --clear --system-site-packages "$venv"
    keep_system_torch
    env -u PYTHONDONTWRITEBYTECODE PIP_ROOT_USER_ACTION=ignore "$venv/bin/python" -m pip install --quiet \
        --disable-pip-version-check --compile --no-index --find-links "$wheels" --no-deps --require-hashes -r "$list"
else
    if [ "$core$system_torch" ]; then
        groups=()
        [ "$core" ] || groups=(--group full --group stores --group dev --group fast-tokenizer)
        list=$scratch/requirements.txt
        if [ "$system_torch" ]; then
            requirements_without_torch "$uv" "$python" "${groups[@]}" >"$list"
        else
            "$uv" pip compile --quiet --generate-hashes --python "$python" --constraint "$lock" pyproject.toml >"$list"
        fi
    else
        list=$lock
    fi
    echo "install: $venv from $lock ($(grep -c == "$list") packages; a minute or two)"
    "$uv" venv --quiet --clear ${system_torch:+--system-site-packages} --python "$python" "$venv"
    [ -z "$system_torch" ] || keep_system_torch
    "$uv" pip sync --quiet --compile-bytecode --python "$venv/bin/python" --require-hashes "$list"
    echo "install: MegaBlocks as pure Python"
    standin=$(torch_stand_in "$uv" pip install --python "$venv/bin/python")
    PYTHONPATH=$standin "$uv" pip install --quiet --compile-bytecode --python "$venv/bin/python" --no-deps \
        --no-build-isolation --require-hashes -r requirements-megablocks.lock
fi

# Composer's launcher without the imports that nobody uses (train/lazy_imports.py): it starts in a third of the time.
cat >"$venv/bin/composer" <<PY
#!$PWD/$venv/bin/python
import sys

sys.path.insert(0, "$PWD")
import train  # noqa: F401  (prepares the import of Composer)
from composer.cli.launcher import main

del sys.path[0]
sys.exit(main())
PY

[ -z "${options[*]}" ] || printf '%s\n' "$python" "${options[@]}" >"$kept"
echo "$want" >"$stamp"
