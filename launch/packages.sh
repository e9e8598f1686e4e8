# What installing (install.sh) and collecting wheels (wheels.sh) have in common; sourced by both, in the root of the
# checkout. Reads STACK, PYTHON and PYENV_ROOT; sets venv, lock and versions, the Pythons that fit.

fail() { # message: a mistake of the user's
    echo "launch/${0##*/}: $1" >&2
    exit 2
}

case ${STACK:-default} in
default) venv=.venv lock=requirements.lock versions="3.12 3.13" ;;
minimum) venv=.venv-minimum lock=requirements-minimum.lock versions="3.11" ;;
*) fail "STACK=$STACK is not known; it is default or minimum" ;;
esac

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Prints a Python of a fitting version that has a module: PYTHON if it is set, else one on PATH, else pyenv's, whose
# shims need not lead to it.
find_python() { # module
    local version candidate
    for version in $versions; do
        for candidate in ${PYTHON:-python$version python3 ${PYENV_ROOT:-~/.pyenv}/versions/$version.*/bin/python}; do
            if "$candidate" -c "import sys; from importlib.util import find_spec
sys.exit('%d.%d' % sys.version_info[:2] != '$version' or find_spec('$1') is None)" 2>/dev/null; then
                command -v "$candidate"
                return
            fi
        done
    done
    return 1
}

# Prints uv: the one on PATH, else a private copy that touches nothing outside this folder.
find_uv() {
    command -v uv && return
    if [ ! -x .cache/tools/bin/uv ]; then
        echo "${0##*/}: uv into .cache/tools" >&2
        PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --disable-pip-version-check \
            --target .cache/tools uv 2>"$scratch/uv.log" || { cat "$scratch/uv.log" >&2; exit 1; }
    fi
    echo "$PWD/.cache/tools/bin/uv"
}

# Prints the packages of some groups of pyproject.toml at the lock's versions, but for torch and what it brings along.
requirements_without_torch() { # uv, python, then --group NAME ...
    local uv=$1 python=$2
    shift 2
    printf "%s; sys_platform == 'never'\n" torch torchvision triton >"$scratch/overrides.txt"
    "$uv" pip compile --quiet --no-header --no-annotate --generate-hashes --python "$python" \
        --constraint "$lock" --override "$scratch/overrides.txt" "$@" pyproject.toml
}

# Makes a folder with setuptools and a stand-in for torch, and prints it. MegaBlocks' build asks a GPU for its compute
# capability before it compiles; the stand-in, seen only by that build, makes it build as pure Python.
# train/model/megablocks_ops.py supplies the operations. A compiled megablocks_ops, where there is one, takes
# precedence at run time.
torch_stand_in() { # command that installs
    awk '/^[^ ]/ { wanted = /^setuptools==/ } wanted' "$lock" >"$scratch/setuptools.txt"
    "$@" --quiet --target "$scratch/standin" --no-deps --require-hashes -r "$scratch/setuptools.txt" >&2
    mkdir -p "$scratch/standin/torch/utils"
    echo '__version__ = "2.7.0"' >"$scratch/standin/torch/__init__.py"
    : >"$scratch/standin/torch/utils/__init__.py"
    echo 'CUDA_HOME = BuildExtension = CUDAExtension = None' >"$scratch/standin/torch/utils/cpp_extension.py"
    echo "$scratch/standin"
}
