#!/bin/sh
# Renew requirements/{cpu,gpu}.txt from pyproject.toml, with the digests of all files that an index has of a version.
set -eu
cd "$(dirname "$0")/.."
LINKS="${PIP_FIND_LINKS:-$(.venv/bin/python -m pip config get global.find-links 2>/dev/null || true)}"
lock() { .venv/bin/uv pip compile -q --universal --python-version 3.11 --no-header --no-annotate --generate-hashes "$@"; }

if [ -n "$LINKS" ]; then set -- --find-links "$LINKS"; else set -- --torch-backend cpu; fi
lock pyproject.toml --extra cpu --extra dev --override requirements/cpu-overrides.txt "$@" -o requirements/cpu.txt
lock pyproject.toml --extra gpu --extra dev -o requirements/gpu.txt

# A package and its digests on one line. The CPU build of torch has none: a folder of wheels has that of one platform only.
sed -i -e ':a' -e '/\\$/{N;s/ *\\\n */ /;ba' -e '}' requirements/cpu.txt requirements/gpu.txt
sed -i -e "/sys_platform == 'never'/d; /^--/d; /^torch==[0-9.]* ;/d" \
    -e 's/^torch==\([0-9.]*\)+cpu.*/torch==\1+cpu/' requirements/cpu.txt
