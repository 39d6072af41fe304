# Every target may be called again, and after an interruption: what takes long goes on where it was.

PY := .venv/bin/python
INSTALLED := .venv/installed
FITS := -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))'
IS_311 := -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'
FIRST_NOTEBOOK = $(firstword $(sort $(wildcard notebooks/[0-9][0-9]_*.ipynb)))
RECIPE_OPTIONS = $(if $(MINUTES),--minutes $(MINUTES)) $(if $(filter 1,$(SMOKE)),$(SMOKE_FOLDERS))
SMOKE_FOLDERS := --smoke --work build/smoke/work --out build/smoke/data

PROFILE ?= reader

# On Linux, glibc hands large buffers back to the system after every layer and takes them again, page
# by page: up to a third of the U-Net's time. These keep them; elsewhere they mean nothing.
export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
export MALLOC_TRIM_THRESHOLD_ ?= 4294967296
# The OpenMP of PyTorch's Linux wheels puts its threads to sleep between layers, and wakes them again: half of the
# U-Net's time on 8 latents. A short spin keeps them awake.
export GOMP_SPINCOUNT ?= 10000
# Many containers forbid Python to keep what it has compiled. Every kernel would then compile all packages anew: 15
# seconds each.
unexport PYTHONDONTWRITEBYTECODE

.DELETE_ON_ERROR:
.PHONY: help setup figures test lab world evaluate tune compare bench site lint clean

help:
	@echo "make setup    install everything into .venv       (1 minute with a warm cache, else up to 10)"
	@echo "make figures  run the notebooks in a reader's size, into build/reader (it says how long)"
	@echo "              PROFILE=paper takes as many samples as the committed figures and replaces those (it resumes)"
	@echo "              FIGURE=2 runs only what that figure of the paper needs, into build/figure-2"
	@echo "make test     lint, then the tests                (some minutes)"
	@echo "make lab      open the notebooks in JupyterLab    (until you close it; LAB_OPTIONS=--no-browser and the like)"
	@echo "make world    train the bundled models anew       (hours on a CPU, minutes on a GPU; resumes)"
	@echo "              MINUTES=10 stops at a checkpoint after 10 minutes; SMOKE=1 tries it all at toy size (3 minutes)"
	@echo "make evaluate sample all that the scorecard rests on (about 40 minutes on 2 cores; resumes)"
	@echo "make tune     try the settings of every mitigation  (13 minutes on 2 cores; resumes)"
	@echo "make compare  sample the comparison, PROFILE=reader or paper (says how long; resumes)"
	@echo "make site     pages of the notebooks, in build/site (seconds)"
	@echo "make bench    time it all against diffusers' pipeline and this machine's limits (about half an hour)"
	@echo "make lint     ruff only                           (seconds)"
	@echo "make clean    remove .venv and caches, not build/ (seconds)"

setup: $(INSTALLED)
	@echo "setup: .venv is ready"

# The stamp is written last, so an interrupted install is done again. An environment that works is
# kept and brought up to date; one that is half made, or made by another Python, is made anew.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "setup: installing into .venv (1 minute with a warm cache, else up to 10)"
	@if ! { $(PY) $(FITS) && $(PY) -m pip --version; } >/dev/null 2>&1; then \
	    for python in python3.11 python3 python3.14 python3.13 python3.12; do \
	        if $$python $(FITS) 2>/dev/null; then exec $$python -m venv --clear .venv; fi; \
	    done; \
	    echo "setup: needs Python 3.11 to 3.14, and found none of them" \
	        "(python3 is $$(python3 --version 2>&1 || true)). Install one, or use conda: conda env create" >&2; \
	    exit 1; \
	fi
	@if $(PY) $(IS_311); then \
	    $(PY) -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'; \
	else \
	    echo "setup: this is not Python 3.11: newest versions in the place of those of constraints.txt"; \
	    $(PY) -m pip install --quiet --no-compile --editable '.[dev]'; \
	fi
	@touch $@

figures: $(INSTALLED)
	@echo "figures: running the notebooks$(if $(FIGURE), for figure $(FIGURE)), profile $(PROFILE)"
	@BASINLAB_PROFILE=$(PROFILE) $(PY) notebooks/execute.py $(if $(FIGURE),--figure $(FIGURE))
	@$(if $(FIGURE),,$(if $(filter paper,$(PROFILE)),$(PY) notebooks/paper.py))

# Two processes of one thread each: at the tests' sizes faster than one of two threads.
test: lint
	@echo "test: running tests and doctests (some minutes)"
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup

lint: $(INSTALLED)
	@echo "lint: checking with ruff (seconds)"
	@$(PY) -m ruff check .

lab: $(INSTALLED)
	@echo "lab: opening $(FIRST_NOTEBOOK) in JupyterLab (Ctrl-C twice to close; as root: LAB_OPTIONS=--allow-root)"
	@$(PY) -m jupyterlab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/$(FIRST_NOTEBOOK) $(LAB_OPTIONS)

world: $(INSTALLED)
	@echo "world: training the bundled models" \
	    "($(if $(filter 1,$(SMOKE)),toy size into build/smoke: about 3 minutes,hours on a CPU or minutes on a GPU; stop it and call again to go on))"
	@PYTHONPATH=.:data $(PY) -m recipe $(RECIPE_OPTIONS)

evaluate: $(INSTALLED)
	@echo "evaluate: sampling and judging about 14,000 pictures (about 40 minutes on 2 cores; stop it and call again to go on)"
	@PYTHONPATH=.:data $(PY) -m recipe.evaluate

tune: $(INSTALLED)
	@echo "tune: trying all settings of all mitigations on held-out prompts (13 minutes on 2 cores; stop it and call again to go on)"
	@PYTHONPATH=.:data $(PY) -m recipe.tune

compare: $(INSTALLED)
	@echo "compare: sampling all mitigations in profile $(PROFILE) (stop it and call again to go on)"
	@$(PY) -m basinlab.comparison --profile $(PROFILE) $(if $(filter paper,$(PROFILE)),--out data/comparison.parquet)

site: $(INSTALLED)
	@echo "site: making pages of the notebooks as they are committed (seconds)"
	@$(PY) -m sphinx -q -W -c notebooks/site notebooks build/site
	@echo "site: open build/site/index.html"

bench: $(INSTALLED)
	@echo "bench: all benchmarks, one table in benchmarks/results (about half an hour alone on 2 cores)"
	@$(PY) benchmarks/all.py

# build/ stays: it may hold hours of training.
clean:
	@echo "clean: removing .venv and caches; build/ stays, it may hold hours of training (seconds)"
	@rm -rf .venv .pytest_cache .ruff_cache *.egg-info build/smoke
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@find . -name .ipynb_checkpoints -type d -prune -exec rm -rf {} +
