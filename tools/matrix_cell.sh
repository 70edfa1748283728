#!/bin/bash
# Runs the fast tests in one cell of the support matrix: matrix_cell.sh PYTHON JAX FLAX, e.g. 3.12 0.11.2 0.12.10.
set -eu -o pipefail
python=$1 jax=$2 flax=$3
venv=.venv-$python

interpreter=$(command -v "python$python" || true)
if ! "${interpreter:-false}" --version >/dev/null 2>&1; then # a pyenv shim may exist without its version
    interpreter=$(ls -d "${PYENV_ROOT:-$HOME/.pyenv}/versions/$python".*/bin/python 2>/dev/null | tail -n 1 || true)
fi
if [ -z "$interpreter" ]; then
    echo "Python $python is missing: install it or put python$python on the PATH" >&2
    exit 1
fi

[ -x "$venv/bin/python" ] || "$interpreter" -m venv "$venv"
"$venv/bin/python" -m pip --disable-pip-version-check install -q \
    -r requirements.txt -e '.[dev]' "jax==$jax" "jaxlib==$jax" "flax==$flax"
JAX_PLATFORMS=cpu "$venv/bin/python" -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder -m 'not slow' tests
