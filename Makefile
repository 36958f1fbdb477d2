# make demo | test | test-plain | cuda | triton | slurm | ray | slow | studies | soak | check | lowest | docs | dist:
# each starts from nothing and makes its own environment.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$p" && break; done)
BIN := .venv/bin
INSTALLED := .venv/.installed
DEMO_INSTALLED := .venv/.installed-demo
TORCH := $(shell grep '^torch==' constraints.txt)

DIST := .venv-dist
DIST_BIN := $(DIST)/bin
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

LOWEST := .venv-lowest
LOWEST_BIN := $(LOWEST)/bin
UV = $(LOWEST_BIN)/uv pip install --quiet --python $(LOWEST_BIN)/python --resolution lowest-direct -c $(LOWEST)/torch.txt

# Everything that computes with networks, whose kernels are tested in tests/ops/raw; less what is about files, figures
# and messages, or computes with no network.
NUMERIC := $(addprefix tests/,attacks evaluation models moe ops pruning training export test_recipes.py) \
	$(addprefix --ignore=tests/,ops/raw evaluation/test_distributions.py evaluation/test_intervals.py \
	models/test_model_files.py models/test_sources.py training/test_board.py training/test_checkpoint.py \
	training/test_data_notes.py training/test_leftovers.py training/test_manifest.py training/test_schedule.py)

# What calls each dependency: networks and data, training, evaluation, export, the Hub, figures, reports, TensorBoard.
# The page in a browser depends on none of them.
CALLING := tests/cli/test_cli.py tests/cli/test_export.py tests/cli/test_train.py tests/cli/test_evaluate.py tests/config \
	tests/test_recipes.py tests/export tests/test_exported.py tests/hub tests/report --ignore=tests/report/test_browser.py \
	tests/data/test_digits.py tests/data/test_folder.py tests/attacks/test_autoattack.py \
	tests/evaluation/test_intervals.py tests/studies/test_significance.py tests/test_files.py tests/test_progress.py \
	tests/training/test_board.py tests/training/test_checkpoint.py tests/training/test_run.py

# Compiled once and kept: else each process compiles again what it imports, and pytest rewrites every test.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-plain cuda triton slurm ray slow studies soak check lowest docs dist format clean

# In the developers' environment where there is one, else with what it needs and nothing else.
demo:
	@echo "AdvMoE on handwritten digits: 5 epochs of training, then attacks on what came of it. It takes two minutes on"
	@echo "two cores, and the first time those of installing PyTorch into .venv. Interrupt it, and make demo goes on."
	@test -e $(INSTALLED) || $(MAKE) --no-print-directory $(DEMO_INSTALLED)
	@if test -e runs/demo/config.yaml; then set -- --resume runs/demo; \
		else set -- --config digits-advmoe --run-dir runs/demo; fi; \
		echo "$(BIN)/advmoe train $$*"; $(BIN)/advmoe train "$$@"
	$(BIN)/advmoe evaluate runs/demo
	@echo "run kept in runs/demo"

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not studies and not ray"

# The same networks without kernels of ours, as GPUs, Macs and Windows compute them.
test-plain: $(INSTALLED)
	ADVMOE_NATIVE=0 $(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not studies and not ray" $(NUMERIC)

# Every path of a GPU, on devices that host memory stands in for (tests/cuda/device.cpp); on a machine with a GPU,
# `pytest -m gpu` runs the same tests on that.
cuda: $(INSTALLED)
	$(BIN)/python tests/cuda/pretended.py
	PRETENDED_CUDA=2 PYTHONPATH=tests/cuda/site ADVMOE_NATIVE=0 $(BIN)/python -m pytest -n auto --dist worksteal -m gpu

# The kernels for GPUs, in Triton's interpreter on the CPU; and that they compile for GPUs, which needs none.
triton: .venv/.triton
	PYTHONPATH=.venv/triton TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "triton and not gpu"
	$(BIN)/python tests/cuda/pretended.py
	PRETENDED_CUDA=2 PYTHONPATH=tests/cuda/site:.venv/triton ADVMOE_NATIVE=0 TRITON_INTERPRET=1 \
		$(BIN)/python -m pytest -m "triton and gpu"

# A real SLURM of two nodes on this machine: as root, with slurm-wlm and munge installed; it takes /etc/slurm.
slurm: $(INSTALLED)
	TESTS_MAY_START_SLURM=1 $(BIN)/python -m pytest -m slurm

# A Ray on this machine, which the tests start and end.
ray: $(INSTALLED)
	$(BIN)/python -m pytest -m ray

slow: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist worksteal -m slow

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

# The lowest versions that pyproject.toml allows of all that it names. But for torch: what constraints.txt names stays,
# as pip finds that without CUDA; a lower one is a download of gigabytes.
lowest: $(LOWEST)/.installed
	$(LOWEST_BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not studies and not ray" $(CALLING)

# The site, into build/site; a link to nothing fails. Tests read it there (tests/docs/test_site.py).
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean
	@echo "site: build/site; shown by $(BIN)/python -m http.server -d build/site"

# The wheel and the sdist, in dist/: as an index shows them, and as somebody without a clone installs and uses them. The
# sdist is tried where the wheel was, which spares the installation of torch.
dist: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m pip install --quiet build twine 'readme_renderer[md]' hatchling hatch-fancy-pypi-readme \
		-c constraints.txt
	$(BIN)/python -m build --no-isolation
# It renders no Markdown: packed.py does.
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python .ci/packed.py dist
	$(PYTHON) -m venv --clear $(DIST)
	$(DIST_BIN)/python -m pip install --quiet --no-compile $(TORCH) -c constraints.txt
	$(DIST_BIN)/python -m pip install --quiet --no-compile dist/advmoe-$(VERSION)-py3-none-any.whl -c constraints.txt
	$(DIST_BIN)/python .ci/smoke.py $(VERSION)
	$(DIST_BIN)/python -m pip install --quiet --no-deps --force-reinstall dist/advmoe-$(VERSION).tar.gz
	$(DIST_BIN)/python .ci/smoke.py $(VERSION)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv $(LOWEST) $(DIST) build dist *.egg-info \
		.pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# torch comes first and pinned, lest a dependency bring another build of it, gigabytes larger.
define VENV
@test -n "$(PYTHON)" || { echo "make: no Python >= 3.11 found; name one: make PYTHON=/path/to/python" >&2; exit 1; }
test -x $(BIN)/python || $(PYTHON) -m venv .venv
$(BIN)/python -m pip install --quiet $(TORCH) -c constraints.txt
endef

$(DEMO_INSTALLED): pyproject.toml constraints.txt
	$(VENV)
	$(BIN)/python -m pip install --quiet -e . -c constraints.txt
	@touch $@

$(INSTALLED): pyproject.toml constraints.txt
	$(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
# Its networks are tested. Without its torchvision, which brings a build of torch and is not needed for them.
	$(BIN)/python -m pip install --quiet --no-deps timm -c constraints.txt
	@touch $@

# Beside the environment: where PyTorch finds Triton it compiles otherwise.
.venv/.triton: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/triton triton -c constraints.txt
	@touch $@

.venv/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -e '.[docs]' -c constraints.txt
	@touch $@

$(LOWEST)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.11 found; name one: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST_BIN)/python -m pip install --quiet $(TORCH) uv -c constraints.txt
	echo '$(TORCH)' >$(LOWEST)/torch.txt
	$(UV) -e .
	$(LOWEST_BIN)/python .ci/without-extras.py
	$(UV) -e '.[dev]'
	@touch $@
