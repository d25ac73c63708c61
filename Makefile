# Two commands: `make demo` and `make test`. Both make the virtual environment they need, and are quick when it exists.
PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
export OMP_NUM_THREADS ?= 1
# hundreds of short processes would compile the sources anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-nightly check chaos clean

# torch alone and first: beside other packages pip may take another build of it
$(VENV)/installed: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: install Python 3.11, or name it: make PYTHON=... $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(VENV)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/domainshuttle demo

# three processes, so that two cores have work while tests wait; what each of them runs is in tests/conftest.py
test: $(VENV)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n 3 --dist loadgroup --no-loadscope-reorder

# whole trainings, for which a working day has no time
test-nightly: $(VENV)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m nightly --timeout=1200
	@# apart, since diffusers imports PEFT wherever it is installed: seconds of every start
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/peft peft==0.21.2
	PYTHONPATH="$(CURDIR)/build/peft" PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest tests/model/test_transformer.py tests/model/test_lora.py -k lora

# one run of the demo's size under 20 random faults, and its accounts
chaos: $(VENV)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/chaos.py --faults 20

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# the root is the package, which mypy finds only under its name
	@mkdir -p build/types/domainshuttle
	@for room in model pipelines cluster platform configs; do ln -sfn ../../../$$room build/types/domainshuttle/$$room; done
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p domainshuttle

clean:
	rm -rf $(VENV) build dist demo ablation chaos .pytest_cache .mypy_cache .ruff_cache .hypothesis domainshuttle.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
