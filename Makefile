# For people who build and run pfvol from a checkout. `make help` lists the targets; nothing has to be prepared for any.

PYTHON ?= python3
VENV   ?= .venv
MINUTES ?= 10
ROUNDS ?= 20
MIB ?= 256
KILLS ?= 50
STATES ?= 50000
export PYTHON

RUN      := $(VENV)/bin/python
SOURCES  := setup.py $(wildcard datapath/*.pyx datapath/*.pxd datapath/*.h)
SANITIZE := build/sanitize

.DEFAULT_GOAL := help
.PHONY: help build demo test lint bench model sanitize fuzz crash crashstates soak failover failpoints rebuild verify memory dist clean \
	system-build system-demo system-hosts system-test

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

system-build system-demo system-hosts system-test:
	@tools/setup/system.sh $(@:system-%=%)

$(VENV)/.installed: pyproject.toml tools/setup/environment.sh | system-build
	@tools/setup/environment.sh $(VENV)
	@touch $@

$(VENV)/.built: $(SOURCES) $(VENV)/.installed
	@echo "building the extensions" >&2
	@$(RUN) setup.py -q build_ext --inplace
	@touch $@

build: $(VENV)/.built  ## install everything into .venv and build the extensions in place

demo: system-demo build  ## a cluster, a mount, data in and out, all cleaned up (KEEP=1 leaves it mounted)
	@$(RUN) -m tools.demo.demo $(if $(KEEP),--keep)

test: system-test build  ## the whole suite, linters included (ARGS= goes to pytest)
	@$(RUN) -m pytest -q $(ARGS)

lint: build  ## ruff, mypy, cython-lint, the import arrow: what the suite checks too
	@$(RUN) -m pytest -q tests/unit/test_architecture.py

bench: system-demo build  ## the benchmark matrix on a mounted volume, then each layer (ARGS= goes to the program)
	@$(RUN) -m tools.bench.run $(ARGS)

model: build  ## the protocol of two copies searched within larger bounds, and each known mistake found
	@$(RUN) -m tests.model.run

sanitize: build  ## the engines' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@tools/setup/sanitize.sh $(RUN) $(SANITIZE) $(ARGS)

fuzz: build  ## random and damaged input for MINUTES=10: frames, devices, a live engine
	@$(RUN) -m tools.fuzz.run --minutes $(MINUTES)

crash: system-demo build  ## kill -9 of a whole cluster under load, ROUNDS=20 times: is anything lost?
	@$(RUN) -m tools.soak.killall --rounds $(ROUNDS) $(ARGS)

crashstates: build  ## STATES=50000 states that a loss of power may leave on the disks, recovered; then each known mistake
	@$(RUN) -m tests.crashstates.run --states $(STATES) $(ARGS)
	@$(RUN) -m tests.crashstates.run --mistakes

soak: system-hosts build  ## random faults for MINUTES=10 under load on hosts that can be cut: is anything lost or stale? SEED=
	@$(RUN) -m tools.soak.faults --minutes $(MINUTES) --namespaces $(if $(SEED),--seed $(SEED)) $(ARGS)

failover: system-hosts build  ## how long IO stands still when a server dies (KILLS=50 times) or hangs, or the MDM is away
	@$(RUN) -m tools.soak.failover --kills $(KILLS) $(if $(SEED),--seed $(SEED)) $(ARGS)

failpoints: system-demo build  ## the MDM killed at every boundary of what it does while sets change (ARGS="--only shrink")
	@$(RUN) -m tests.failpoints.run $(ARGS)

rebuild: system-demo build  ## a server lost for good under load: how fast are its copies made again, and do clients notice?
	@$(RUN) -m tools.soak.rebuild $(if $(SEED),--seed $(SEED)) $(ARGS)

verify: system-demo build  ## fio and dd on two volumes: does what is written come back? MIB=256 of each volume
	@$(RUN) -m tools.soak.verify --mib $(MIB) $(ARGS)

memory: system-demo build  ## memory and file descriptors of every process under fio for MINUTES=10: are they flat?
	@$(RUN) -m tools.soak.memory --minutes $(MINUTES) $(ARGS)

dist: build  ## wheel and sdist in dist/
	@mkdir -p build && $(RUN) -m build --no-isolation --outdir dist . >build/dist.log 2>&1 || { cat build/dist.log; exit 1; }
	@ls dist

clean:  ## remove what was built (not .venv)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@rm -f datapath/*.so datapath/*.c datapath/*.cpp datapath/*.html $(VENV)/.built
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
