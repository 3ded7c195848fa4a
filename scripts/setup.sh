#!/bin/sh
# Create .venv and install the pinned packages: the CPU build, or the CUDA build where there is an NVIDIA GPU.
#   SPO_BUILD=cpu|gpu chooses; PYTHON=... names the interpreter (3.11 or newer).
set -eu
cd "$(dirname "$0")/.."

PYTHON="${PYTHON:-python3}"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: Python 3.11 or newer is needed, $PYTHON is $("$PYTHON" -V 2>&1): set PYTHON=/path/to/python3.11" >&2
  exit 2
}
if [ -z "${SPO_BUILD:-}" ]; then
  if nvidia-smi >/dev/null 2>&1; then SPO_BUILD=gpu; else SPO_BUILD=cpu; fi
fi

[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv || {
  echo "error: $PYTHON can't make virtual environments (on Debian: apt-get install python3-venv)" >&2
  exit 2
}
.venv/bin/python -m pip install -q --disable-pip-version-check "uv==$(cat requirements/uv-version)"

# uv does not read pip's configuration; pass on where pip would look for wheels.
pip_setting() { .venv/bin/python -m pip config get "$1" 2>/dev/null || true; }
LINKS="${PIP_FIND_LINKS:-$(pip_setting global.find-links)}"
INDEX="${PIP_INDEX_URL:-$(pip_setting global.index-url)}"
set --
for link in $LINKS; do set -- "$@" --find-links "$link"; done
if [ -n "$INDEX" ]; then set -- "$@" --default-index "$INDEX"; fi
# The CPU build of torch comes from a local folder of wheels if there is one, else from PyTorch's own CPU index.
case "$SPO_BUILD:$(for link in $LINKS; do ls "$link" 2>/dev/null; done)" in
  cpu:*torch-*cpu*) ;;
  cpu:*) set -- "$@" --torch-backend cpu ;;
esac

echo "installing the $SPO_BUILD build into .venv"
# Compiled now, once: else a machine that writes no bytecode (PYTHONDONTWRITEBYTECODE, usual in containers) compiles all
# that a process imports whenever one starts, which takes longer than the import itself.
.venv/bin/uv pip install -q --compile-bytecode --python .venv/bin/python --no-deps -r "requirements/$SPO_BUILD.txt" "$@"
.venv/bin/uv pip install -q --python .venv/bin/python --no-deps -e .
touch .venv/installed
