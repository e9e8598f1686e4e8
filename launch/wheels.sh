#!/usr/bin/env bash
# Collects wheels for an installation without a network: bash launch/wheels.sh [--core] DIR, then
# launch/install.sh --wheels DIR on a machine of the same kind. DIR gets everything but torch and the development
# tools, with --core only the core, and in full.txt and core.txt each wheel's SHA-256. Needs a network and pip.
set -euo pipefail
called_from=$PWD
cd "$(dirname "$0")/.."
. launch/packages.sh

sets=(core full)
if [ "${1:-}" = --core ]; then
    sets=(core)
    shift
fi
case ${1:-} in "" | -*) fail "bash launch/wheels.sh [--core] DIR" ;; esac
[ $# = 1 ] || fail "$2 is not known; bash launch/wheels.sh [--core] DIR"
wheels=$(cd "$called_from" && realpath -m -- "$1")

uv=$(find_uv)
python=$(find_python venv) || fail "Python ${versions// / or } is needed; set PYTHON=/path/to/python${versions%% *}"
mkdir -p "$wheels"
rm -f "$wheels"/*.whl "$wheels"/*.txt
"$python" -m venv "$scratch/venv"
pip() {
    "$scratch/venv/bin/python" -m pip --disable-pip-version-check "$@"
}

for set in "${sets[@]}"; do
    groups=()
    [ "$set" = core ] || groups=(--group full)
    requirements_without_torch "$uv" "$python" "${groups[@]}" >"$scratch/$set.txt"
done
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
