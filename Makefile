# `make serve` and `make test` are all a newcomer needs; everything lives in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= smollm2-135m
SERVE_FLAGS ?= --devices cpu:2 --device-memory 730MiB

.PHONY: install serve test lint unit test-faults test-fake-gpu test-fake-gpu-orders \
  test-fake-gpu-peers test-fake-gpu-host test-fake-gpu-one test-models test-random test-clients test-chart test-ray manifests \
  coverage docs pages paper bench-overload bench-ray scale-out clean

install: $(VENV)/.installed
test-install: $(VENV)/.installed-test

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

serve: $(VENV)/.installed
	$(BIN)/python -m kunserve.server --model $(MODEL) $(SERVE_FLAGS) $(if $(ADMIN_KEY),--admin-key $(ADMIN_KEY))

lint: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

unit: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

test: lint unit

# Every fault in every state; `unit` has a quarter of them.
test-faults: $(VENV)/.installed-test
	KUNSERVE_ALL_FAULTS=1 $(BIN)/python -m pytest --numprocesses 2 tests/engine/survive tests/engine/regroup/test_exactness.py \
	  tests/e2e/server/test_bad_devices.py

# The documentation as a site in build/site; a warning ends it. `unit` builds it as well.
docs: $(VENV)/.installed-test
	$(BIN)/mkdocs build --strict

# The pages of docs/ that are made from the code: after a change of a flag, a metric or the cost model.
pages: $(VENV)/.installed-test
	$(BIN)/python scripts/docs/make_pages.py

# Tests that draw their cases, with others than in every run. `SEED=1234 make test-random` draws the same again.
SEED := $(or $(SEED),$(shell od -An -N4 -tu4 /dev/urandom | tr -d ' '))
test-random: $(VENV)/.installed-test
	@echo "SEED=$(SEED) make test-random"
	KUNSERVE_SEED=$(SEED) $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m drawn --hypothesis-seed $(SEED)

# Which lines no test reaches; the whole of it is in build/coverage.
coverage: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --cov kunserve --cov-report term:skip-covered \
	  --cov-report html:build/coverage

# The engine on GPUs that are not there, in many more orders of their streams; `unit` draws one of each kind. Then every
# test of transitions and of devices that go, on such GPUs: with peers, without (KV goes through the host), and on one.
test-fake-gpu: test-fake-gpu-orders $(addprefix test-fake-gpu-,peers host one)

test-fake-gpu-orders: $(VENV)/.installed-test
	KUNSERVE_FAKE_GPU_ORDERS=8 $(BIN)/python -m pytest --numprocesses 2 tests/engine/step tests/engine/launch \
	  tests/engine/regroup/test_on_gpus.py tests/e2e/engine/test_two_kinds_on_gpus.py tests/gpu tests/compute/cuda

test-fake-gpu-peers: CARDS := peers
test-fake-gpu-host: CARDS := through the host
test-fake-gpu-one: CARDS := one GPU
test-fake-gpu-peers test-fake-gpu-host test-fake-gpu-one: $(VENV)/.installed-test
	KUNSERVE_FAKE_GPU="$(CARDS)" $(BIN)/python -m pytest --numprocesses 2 tests/engine/regroup tests/engine/survive \
	  --ignore tests/engine/regroup/test_on_gpus.py

# Every family with all prompts and layouts; `unit` has one prompt of each.
test-models: $(VENV)/.installed-test
	KUNSERVE_ALL_MODELS=1 $(BIN)/python -m pytest --numprocesses 2 tests/e2e/engine/test_families.py tests/e2e/engine/test_greedy.py \
	  tests/compute/test_decoder.py

# Client libraries in environments of their own, which no other target needs: CI does not run it. Wants npm as well.
CLIENTS := scripts/clients
CLIENT_ENVIRONMENTS := $(patsubst $(CLIENTS)/requirements/%.txt,.clients/%/.installed,$(wildcard $(CLIENTS)/requirements/*.txt))

test-clients: $(VENV)/.installed $(CLIENT_ENVIRONMENTS) $(CLIENTS)/ai_sdk/node_modules/.installed
	$(BIN)/python $(CLIENTS)/run_clients.py --page docs/clients.md

.clients/%/.installed: $(CLIENTS)/requirements/%.txt
	$(PYTHON) -m venv .clients/$*
	.clients/$*/bin/pip install --quiet --requirement $<
	touch $@

$(CLIENTS)/ai_sdk/node_modules/.installed: $(CLIENTS)/ai_sdk/package-lock.json
	npm ci --no-audit --no-fund --prefix $(CLIENTS)/ai_sdk
	touch $@

# The Helm chart: rendered by Helm's own engine, compared with deploy/kubernetes, held against published schemas; and the
# Dockerfiles, linted. In an environment of its own (350 MB), which no other target needs: CI does not run it. Wants npm.
CHART := scripts/check/chart
RENDER := .chart/bin/python scripts/check/render_chart.py

test-chart: .chart/.installed
	$(RENDER)
	.chart/bin/hadolint --failure-threshold error deploy/Dockerfile deploy/Dockerfile.cuda

manifests: .chart/.installed
	$(RENDER) --write

.chart/.installed: $(CHART)/requirements.txt $(CHART)/package.json
	$(PYTHON) -m venv .chart
	.chart/bin/pip install --quiet --requirement $(CHART)/requirements.txt
	cp $(CHART)/package.json .chart/
	npm install --no-audit --no-fund --no-package-lock --prefix .chart
	touch $@

# Replicas behind Ray Serve: one is killed, one comes and goes. In an environment of their own: CI does not run it.
test-ray: .ray/.installed
	PYTHONPATH=scripts/bench .ray/bin/python scripts/check/ray_replicas.py
	PYTHONPATH=scripts/bench .ray/bin/python scripts/check/ray_scaled_down.py

# What the front costs: the same load direct and through it, side by side.
bench-ray: .ray/.installed
	PYTHONPATH=scripts/check .ray/bin/python scripts/bench/bench_ray.py

# A burst over two replicas that drop, until a third one is ready.
scale-out: .ray/.installed
	PYTHONPATH=scripts/bench:scripts/check .ray/bin/python scripts/scale_out.py

.ray/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .ray
	.ray/bin/pip install --quiet --constraint constraints.txt torch
	.ray/bin/pip install --quiet --constraint constraints.txt --editable '.[ray]'
	touch $@

paper: $(VENV)/.installed-test
	$(BIN)/python scripts/figures/paper.py

bench-overload: $(VENV)/.installed-test
	$(BIN)/python scripts/bench/compare_policies.py

clean:
	rm -rf $(VENV) .clients .chart .ray $(CLIENTS)/ai_sdk/node_modules build *.egg-info
