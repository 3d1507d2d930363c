# One vocabulary for developers, hooks and CI. `make` alone prints it.
PYTHON ?= python3
BIN := .venv/bin
ESPALIER := $(BIN)/espalier
READY := .venv/.ready
# cuda: the packages of the lock. cpu: torch and torchvision of the same versions without CUDA, not checked by a hash.
INSTALLED := $(or $(shell cat .venv/torch 2>/dev/null),cuda)
TORCH ?= $(INSTALLED)
$(if $(filter cuda cpu,$(TORCH)),,$(error TORCH is $(TORCH); it can be cuda or cpu))

# Nothing this project runs reports to anyone.
export DO_NOT_TRACK := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PREFECT_SERVER_UI_V2_ENABLED := false
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: other-torch help setup run flow test e2e e2e-registry e2e-schedule preset image stack check format lock base results tables docs docs-test notebooks sizes systems ui server audit sbom prefect-server fuzz clean

help: ## Print these targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(READY) ## Create .venv with everything in requirements.lock; TORCH=cpu leaves CUDA out

$(READY): requirements.lock pyproject.toml $(if $(filter-out $(TORCH),$(INSTALLED)),other-torch)
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else f"Espalier needs Python 3.11 to 3.13, found {sys.version.split()[0]}; choose one with: make PYTHON=python3.12 setup")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	awk '/^[a-z0-9]/ { keep = /^uv==/ } keep' requirements.lock >.venv/uv.lock
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement .venv/uv.lock
	awk '/^[a-z0-9]/ { keep = "$(TORCH)" == "cuda" || $$0 !~ /^(torch|torchvision|triton|nvidia-[^=]+|cuda-[^=]+)==/ } keep' requirements.lock >.venv/packages.lock
	VIRTUAL_ENV=.venv $(BIN)/uv pip sync --require-hashes --compile-bytecode .venv/packages.lock
	test $(TORCH) = cuda || VIRTUAL_ENV=.venv $(BIN)/uv pip install --no-deps --torch-backend=cpu --compile-bytecode $$(awk '/^(torch|torchvision)==/ { print $$1 }' requirements.lock)
	VIRTUAL_ENV=.venv $(BIN)/uv pip install --no-deps --no-build-isolation --editable .
	@echo $(TORCH) >.venv/torch
	@touch $@

other-torch: # the environment was made with the other build of PyTorch

run: $(READY) ## Prune the bundled model: run every stage of dvc.yaml that is out of date
	@exec $(ESPALIER) run

preset: $(READY) ## Make params.yaml one of recipes/presets: make preset NAME=cifar10
	@$(ESPALIER) preset $(NAME)

flow: $(READY) ## The same pipeline as a Prefect flow, with no server
	@exec $(ESPALIER) compress

test: $(READY) ## Run the tests, on two cores
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

e2e: $(READY) ## Run the tests marked e2e: servers killed, sweeps, whole systems, and the two below (about an hour)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m e2e

e2e-registry: $(READY) ## The whole way on real servers and without any: compress … promote, serve, reproduce (about 20 minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m e2e -s tests/pipeline/test_end_to_end.py

e2e-schedule: $(READY) ## Schedules, workers and servers as in production, and what happens when they die (about 15 minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m e2e -s tests/pipeline/test_schedule.py

fuzz: $(READY) ## Read damaged files of every kind for SECONDS (by default an hour)
	@OMP_NUM_THREADS=1 ESPALIER_FUZZ_SECONDS=$(or $(SECONDS),3600) $(BIN)/python -m pytest -rP tests/fuzz --timeout 0

image: ## Build the image, with buildah where there is no engine, and run the pipeline in it (docs/docker.md)
	@.ci/image --run

stack: ## Start PostgreSQL, S3, MLflow, Prefect and a worker in containers (docs/docker.md)
	docker compose --env-file compose.env up --build --detach

check: $(READY) ## Lint, types, import directions, secrets, Dockerfiles
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	.ci/secrets
	.ci/dockerfiles

audit: $(READY) ## Ask whether a locked version has a known vulnerability (needs the internet)
	@.ci/audit

sbom: $(READY) ## Write the packages that the image installs, with their licences, to sbom/ (CycloneDX)
	@.ci/sbom

format: $(READY) ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: ## Resolve requirements.lock anew from pyproject.toml
	$(BIN)/uv pip compile --universal --python-version 3.11 --group dev --extra server --extra deploy --generate-hashes --no-header --no-emit-index-url --output-file requirements.lock pyproject.toml --upgrade

base: $(READY) ## Retrain the bundled digits model and classifier (about ten minutes)
	$(BIN)/python -m recipes.digits

results: $(READY) ## Copy the pipeline's results table into README.md
	$(BIN)/python docs/results.py

tables: $(READY) ## Write tables and plots of docs/compare.md anew from the measurements in docs/tables
	$(BIN)/python docs/tables.py

docs: $(READY) ## Build the documentation site into site/, strictly and offline
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "open site/index.html, or serve it, which its search needs: python3 -m http.server --directory site"

docs-test: $(READY) ## Build the site anew, open its pages in Chromium, and run the notebooks (half a minute)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m e2e -n 2 --dist loadfile tests/docs

notebooks: $(READY) ## Run the notebooks of docs/notebooks and write their outputs into them
	$(BIN)/python docs/run_notebooks.py

sizes: $(READY) ## Cut each of the paper's models at ratio 0.3 and print parameters and MACs (about a minute)
	@$(BIN)/python -m benchmarks.sizes

systems: $(READY) ## Take the paper's five systems, the LDM of CelebA-HQ and DiT-XL/2 through all stages, initialised from their exact configs (about an hour)
	@$(BIN)/python -m benchmarks.systems

ui: $(READY) ## Look at the recorded compressions in MLflow's UI, on loopback
	@exec $(ESPALIER) ui

server: $(READY) ## Start the tracking and registry server as mlflow/server.env says
	@test -f mlflow/server.env || { echo "mlflow/server.env is not there; copy mlflow/server.env.example and fill it in" >&2; exit 1; }
	@set -a && . mlflow/server.env && exec mlflow/serve

prefect-server: $(READY) ## Start Prefect's server, with a password that is made once (docs/flows.md)
	@exec $(ESPALIER) server

clean: ## Remove what the pipeline made; the environment stays
	rm -rf artifacts checkpoints reports .dvc/cache .dvc/tmp
