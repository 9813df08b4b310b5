# Targets first create .venv from requirements.lock. `make help` lists them.
PYTHON ?= python3.11
VENV := .venv
# the lock without hashes, because torch for CPU and for CUDA differ, and so do their dependencies
VERSIONS := sed -nE 's/^([A-Za-z0-9._-]+==[^ ]+) .*/\1/p'
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install demo ui test e2e-cluster check format lock images cpu-image sbom manifests pipelines reference screenshots clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## create .venv from the lock

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VERSIONS) requirements.lock > $(VENV)/versions.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint $(VENV)/versions.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: install ## run the whole platform, from synthetic clips to registered models: 12 minutes on 2 cores
	$(BIN)/mplug demo demo

ui: install ## open MLflow with the results of the demo
	$(BIN)/mplug ui demo

test: install ## run the tests
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

check: install ## formatting, lint, types, imports between modules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install ## format, and fix lint errors
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: ## resolve pyproject.toml into requirements.lock
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet torch==2.13.0
	.venv-lock/bin/pip install --quiet -e '.[demo,server,dev,bench]'
	.venv-lock/bin/pip freeze --all --exclude-editable --exclude pip | sed 's/+cpu//' > .venv-lock/versions.txt
	.venv-lock/bin/pip install --quiet uv
	.venv-lock/bin/uv pip compile --quiet --no-deps --generate-hashes --no-header --no-annotate \
	  --python-version 3.11 --output-file requirements.lock .venv-lock/versions.txt
	rm -rf .venv-lock

e2e-cluster: install ## end-to-end test on the cluster of the current context, or on one started on this machine
	MPLUG_E2E=1 $(BIN)/pytest -rs tests/e2e

BUILDER ?= $(shell command -v podman || command -v docker)
VERSION := 0.1.0
IMAGES := training mlflow

images: ## build the container images with podman or docker, with options BUILD_FLAGS="…"
	for name in $(IMAGES); do \
	  $(BUILDER) build $(BUILD_FLAGS) --target $$name --build-arg VERSION=$(VERSION) \
	    --build-arg REVISION=$$(git rev-parse HEAD) --file docker/$$name.Dockerfile \
	    --tag localhost/mplug-video/$$name:$(VERSION) . || exit 1; \
	done

TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

cpu-image: ## build the training image without CUDA, for pipeline steps without a GPU
	$(BUILDER) build $(BUILD_FLAGS) --target training --build-arg VERSION=$(VERSION) --build-arg TORCH_INDEX=$(TORCH_INDEX) \
	  --build-arg REVISION=$$(git rev-parse HEAD) --file docker/training.Dockerfile \
	  --tag localhost/mplug-video/training-cpu:$(VERSION) .

sbom: ## write inventories of the images in CycloneDX to dist/
	for name in $(IMAGES); do \
	  $(BUILDER) build $(BUILD_FLAGS) --target sbom --output type=local,dest=dist \
	    --file docker/$$name.Dockerfile . || exit 1; \
	done

manifests: install ## build and validate all overlays and jobs; needs kubectl
	$(BIN)/python k8s/validate.py

pipelines: install ## compile the pipelines into pipelines/compiled
	$(BIN)/mplug pipeline compile

reference: install ## write docs/configuration.md from the fields of the configuration
	$(BIN)/python -m model.config.reference > docs/configuration.md

screenshots: install ## take screenshots of the report and MLflow for the README, from the last demo (needs Chromium)
	$(BIN)/python -m tests.helpers.screenshots demo docs

clean: ## delete the demo and its results
	rm -rf demo
