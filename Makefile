# `make quickstart` and `make test` do all the set-up they need; every target takes PYTHON=python3.12 and the like.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: help setup quickstart test test-slow coverage lint clean

help:
	@echo "make quickstart   both defences on the bundled images, end to end; table and pictures in results/"
	@echo "make test         the fast tests      make test-slow   all of them"
	@echo "make lint         ruff                make coverage    the fast tests, with the lines they miss"
	@echo "make clean        remove the quickstart's networks and samples"

$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed, this is " + sys.version.split()[0] + "; use make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

setup: $(VENV)/installed

quickstart: setup
	$(RUN) reproduce.py --preset quickstart

test: setup
	$(RUN) -m pytest -n 2 --dist loadfile

test-slow: setup
	$(RUN) -m pytest -m ''

coverage: setup
	$(RUN) -m pytest --cov --cov-report=term-missing:skip-covered

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf saved/backdoored_model/poison_rate_0.1/*/fashion/resnet10/gridTrigger saved/separated_samples/fashion/resnet10/gridTrigger_*
	rm -rf ST/save/poison_rate_0.1/SupCon_models/fashion/resnet10/gridTrigger_*
