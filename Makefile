# `make` lists what there is to do. Everything runs in .venv, which `make setup` makes from constraints.txt.
SHELL := bash
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
# One thread a process: the sweep and the tests run several processes, and torch would give each of them every core.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup reproduce reproduce-daclip reproduce-wild test lab bench docs slurm-up slurm-down clean

help:       ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' Makefile

setup:      ## make .venv from constraints.txt and install the package and its git hooks (does nothing when up to date)
	@PYTHON='$(PYTHON)' bash .ci/setup

reproduce: setup ## run the miniature sweep, then write its table and figures to results/ and the README (continues where it stopped)
	@$(BIN)/daclip sweep experiments/sampling.yaml --workers $(WORKERS)
	@$(BIN)/daclip tables experiments/sampling.yaml
	@$(BIN)/daclip readme

# The folders are linked into experiments/, where the sweep files look for them; each is hashed, so that a run knows its photographs.
LINK = link() { [ -d "$$2" ] || { echo "make $@: $$1 must name a folder of photographs, as in $$1=~/photos" >&2; return 1; }; \
	  ln -sfn "$$(realpath "$$2")" "experiments/$$3"; }
SWEEP = for name in $(1); do $(BIN)/daclip sweep experiments/$$name.yaml --workers $(WORKERS) && \
	  $(BIN)/daclip tables experiments/$$name.yaml || exit; done

reproduce-daclip: setup ## PHOTOS=… CBSD68=… LIVE1=…: DA-CLIP's sweeps, some four hours on two cores; photographs to train on, and two test sets (continues too)
	@$(LINK); link PHOTOS "$(PHOTOS)" photographs && link CBSD68 "$(CBSD68)" cbsd68 && link LIVE1 "$(LIVE1)" live1
	@$(call SWEEP,daclip_classification daclip_loss daclip_specific daclip_embeddings daclip_unified daclip_mixed)

reproduce-wild: setup ## PHOTOS=…: robust DA-CLIP's sweeps, some three hours on two cores; photographs to train on (continues too)
	@$(LINK); link PHOTOS "$(PHOTOS)" photographs
	@$(call SWEEP,wild_ablation wild_mixed wild_real)

test: setup ## all checks: notebooks in step with the package, README, ruff, notebooks, pytest
	@WORKERS=$(WORKERS) bash .ci/test

lab: setup  ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab --ContentsManager.pre_save_hook=nbdev.clean.clean_jupyter --LabApp.default_url=/lab/tree/nbs/index.ipynb

bench: setup ## time the parts that take long (tests/bench_*.py)
	@shopt -s nullglob; for f in tests/bench_*.py; do echo "== $$f"; $(BIN)/python "$$f" || exit; done

docs: setup ## build the notebooks as a web site in _docs/ (offline)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict && echo "The book is in _docs/index.html"

slurm-up: setup ## start a real Slurm on this machine, for trying out sweeps (installs it where it is missing; as root, on Debian or Ubuntu)
	@$(BIN)/python tests/slurm_cluster.py install
	@$(BIN)/python tests/slurm_cluster.py up

slurm-down: ## stop that Slurm, with its jobs, and delete its state
	@$(BIN)/python tests/slurm_cluster.py down

clean:      ## remove what tools made (.venv and the run records stay)
	rm -rf _docs site build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -print0 | xargs -0 rm -rf
