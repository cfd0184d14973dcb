# What you can ask for: `make help`. Each target redoes only what has changed.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

VENV      := .venv
BIN       := $(VENV)/bin
READY     := $(VENV)/.ready
NOTEBOOKS := $(sort $(wildcard nbs/[0-9]*.ipynb nbs/index.ipynb))
TRAINING  := $(patsubst %,diffusion_book/%,unet.py blocks.py training.py images.py objective.py schedules.py data/fashion_mnist.npz)
MODEL     := out/first_model
MINUTES   ?= 3
PORT      ?= 8000
TESTS     ?= tests

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONUNBUFFERED := 1

.PHONY: help book test serve site export notebooks setup clean

help:  ## this list
	@echo "diffusion_book"
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

# ------------------------------------------------------------------ the environment
# The Python that makes .venv: PYTHON=... if you name one, else the first of these that is 3.11 or newer.
$(BIN)/python:
	@for p in $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python); do \
	    if "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found="$$p"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "No Python 3.11 or newer with venv was found. Install one (on Debian and Ubuntu: python3 and python3-venv),"; \
	    echo "or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1; fi; \
	echo "== making $(VENV) with $$("$$found" --version)"; "$$found" -m venv $(VENV)

$(READY): settings.ini setup.py constraints.txt | $(BIN)/python
	@echo "== installing diffusion_book and what it needs, at the versions in constraints.txt (a minute or two)"
	@$(BIN)/python -m pip install -qq --no-input --progress-bar off -e '.[dev]' -c constraints.txt </dev/null
	@touch $@

setup: $(READY)  ## make .venv and install everything

# ------------------------------------------------------------------ the first command
book: out/samples.png out/film.gif  ## train a small model, draw images with it, build the site
	@$(MAKE) site
	@$(BIN)/python tools/book_pictures.py --model $(MODEL) --closing

# A run that was stopped goes on where it was; a finished one is made anew only when the code it came from has changed.
$(MODEL)/.finished: $(TRAINING) | $(READY)
	@if [ -e $@ ]; then rm -rf $(MODEL); fi; \
	resume=""; if [ -e $(MODEL)/checkpoint.safetensors ]; then resume="--resume"; fi; \
	echo "== training a small U-Net on 10,000 pictures of garments, at most $(MINUTES) minutes$${resume:+, from where it was stopped}"; \
	$(BIN)/diffusion_book_train --data fashion --scale small --minutes $(MINUTES) --out $(MODEL) $$resume </dev/null || exit 1; \
	$(BIN)/python -c 'import json, sys; sys.exit(not json.load(open("$(MODEL)/card.json"))["finished"])' \
	    || { echo "Stopped. Nothing is lost: make book goes on from here."; exit 1; }
	@touch $@

out/samples.png: $(MODEL)/.finished tools/book_pictures.py $(wildcard diffusion_book/weights/fashion/*) | $(READY)
	@echo "== drawing new images, with your model and with the one that ships"
	@$(BIN)/python tools/book_pictures.py --model $(MODEL) </dev/null

out/film.gif: out/samples.png   # the same command makes both
	@test -e $@ || $(BIN)/python tools/book_pictures.py --model $(MODEL) </dev/null

# ------------------------------------------------------------------ the site
site: $(READY)  ## build the site into _docs/
	@$(BIN)/python tools/build_site.py --strict --if-needed </dev/null

serve: site  ## show the site at http://localhost:8000 (PORT=... for another)
	@echo "The book: http://localhost:$(PORT)   (Ctrl-C to stop)"
	@$(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory _docs

# ------------------------------------------------------------------ the second command
test: $(READY)  ## run every test: all notebooks, all of tests/ (TESTS=... for some)
	@$(BIN)/python tools/get_chromium.py </dev/null
	@$(MAKE) site
	@$(BIN)/python -m pytest $(TESTS) </dev/null

# ------------------------------------------------------------------ writing
export: $(READY)  ## notebooks -> modules, and notebooks cleaned
	@$(BIN)/nbdev_export </dev/null
	@$(BIN)/nbdev_clean </dev/null

notebooks: $(READY)  ## run every chapter anew, store its outputs and the table of times (NB=nbs/12_forward.ipynb for some)
	@$(BIN)/python tools/execute_nb.py $(if $(NB),$(NB),$(NOTEBOOKS)) --times nbs/times.json </dev/null

clean:  ## remove what was built: site, pictures, caches (your models in out/ and .venv stay)
	rm -rf _proc _docs _build _site build dist *.egg-info .pytest_cache .hypothesis out/samples.png out/film.gif
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
