#!/usr/bin/env bash
# Collects wheels for an installation without a network: bash launch/wheels.sh [--core | --stores] DIR, then
# launch/install.sh --wheels DIR on a machine of the same kind. DIR gets everything but torch, the development tools
# and the clients of object stores; --core: only the core; --stores: the clients too. core.txt and full.txt there name
# each wheel with its SHA-256. Needs a network and pip.
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
for set in "${sets[@]}"; do
    cat "$scratch/$set.txt" requirements-megablocks.lock | "$python" -c '
import hashlib, re, sys
from pathlib import Path

files = {re.sub("[-_.]+", "-", path.name.split("-")[0]).lower(): path for path in Path(sys.argv[1]).glob("*.whl")}
for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", sys.stdin.read(), re.MULTILINE):
    path = files[re.sub("[-_.]+", "-", name).lower()]
    print(f"{name}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}")
' "$wheels" >"$wheels/$set.txt"
done
"$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' >"$wheels/python"
echo "wheels: $(du -sh --apparent-size "$wheels" | cut -f1) for $(uname -sm) and Python $(<"$wheels/python")"
