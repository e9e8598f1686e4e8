#!/usr/bin/env bash
# Collects wheels for an installation without a network: bash launch/wheels.sh [--core | --stores] DIR, then
# launch/install.sh --wheels DIR on a machine of the same kind. DIR gets everything but torch, the development tools
# and the clients of object stores; --core: only the core; --stores: the clients too. core.txt and full.txt there name
# each wheel with its SHA-256. Wheels are packed again to be smaller: pip installs them, uv does not. Needs a network and pip.
set -euo pipefail
called_from=$PWD
cd "$(dirname "$0")/.."
. launch/packages.sh

usage="bash launch/wheels.sh [--core | --stores] DIR"
sets=(core full) groups=(--group full)
case ${1:-} in
--core) sets=(core) && shift ;;
--stores) groups+=(--group stores) && shift ;;
esac
case ${1:-} in "" | -*) fail "$usage" ;; esac
[ $# = 1 ] || fail "$2 is not known; $usage"
wheels=$(cd "$called_from" && realpath -m -- "$1")

uv=$(find_uv)
python=$(find_python venv) || fail "Python ${versions// / or } is needed; set PYTHON=/path/to/python${versions%% *}"
mkdir -p "$wheels"
rm -f "$wheels"/*.whl "$wheels"/*.txt
"$python" -m venv "$scratch/venv"
pip() {
    "$scratch/venv/bin/python" -m pip --disable-pip-version-check "$@"
}

requirements_without_torch "$uv" "$python" >"$scratch/core.txt"
requirements_without_torch "$uv" "$python" "${groups[@]}" >"$scratch/full.txt"
echo "wheels: into $wheels"
collect=(pip wheel --quiet --no-deps --require-hashes --wheel-dir "$wheels")
"${collect[@]}" -r "$scratch/${sets[-1]}.txt"
standin=$(torch_stand_in pip install)
PYTHONPATH=$standin "${collect[@]}" --no-build-isolation -r requirements-megablocks.lock

# Wheels that were built here have other hashes than the lock, which has those of their sources.
lists=()
for set in "${sets[@]}"; do
    lists+=("$scratch/$set.txt")
    cat requirements-megablocks.lock >>"$scratch/$set.txt"
done
"$python" launch/repack_wheels.py "$wheels" "${lists[@]}"
"$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' >"$wheels/python"
echo "wheels: $(du -sh --apparent-size "$wheels" | cut -f1) for $(uname -sm) and Python $(<"$wheels/python")"
