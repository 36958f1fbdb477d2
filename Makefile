# make demo | test | slow | studies | soak | check: each starts from nothing and makes its own .venv.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$p" && break; done)
BIN := .venv/bin
INSTALLED := .venv/.installed
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test slow studies soak check format clean

demo: $(INSTALLED)
	rm -rf runs/demo
	$(BIN)/advmoe train --config digits-advmoe --run-dir runs/demo
	$(BIN)/advmoe evaluate runs/demo
	@echo "run kept in runs/demo"

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not studies"

slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# Every study at smoke size, on shared runs, and one report of them all.
studies: $(INSTALLED)
	$(BIN)/python -m pytest -m studies

# Kills, damage, full disks and odd command lines for MINUTES, by a SEED that it prints: see docs/soak.md.
soak: $(INSTALLED)
	$(BIN)/python tests/soak/soak.py --minutes $(or $(MINUTES),60) $(if $(SEED),--seed $(SEED))

# Every check runs, whichever fails first.
check: $(INSTALLED)
	@failed=0; for each in "ruff check ." "ruff format --check ." "mypy" "lint-imports"; do \
		echo "$$each"; $(BIN)/$$each || failed=1; done; exit $$failed

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# torch comes first and pinned, lest a dependency bring another build of it, gigabytes larger.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.11 found; name one: make PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH) -c constraints.txt
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	@touch $@
