# Two commands do everything: `make paper_tables` and `make test`. Both build the environment first.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: paper_tables generated test test-versions test-faults test-cluster lint lock clean

paper_tables: $(READY)
	$(BIN)/snakemake paper_tables

# What people read of the tables, as it is kept under version control.
generated: paper_tables
	$(BIN)/python -m prunelab.paper_tables --keep paper_tables/generated

test: $(READY) lint
	$(BIN)/pytest -n 2 --dist loadscope

# What hooks into transformers, on the oldest and the newest release that pyproject.toml allows, or on VERSIONS; an
# environment for each lies in .venvs. SAMPLE=1 runs the part that continuous integration does.
test-versions: $(READY)
	$(BIN)/python -m tests.versions $(if $(SAMPLE),--sample) $(VERSIONS)

# Kills, full disks, damaged files and clocks that jump, against the workflow at smoke scale; a quarter of an hour.
test-faults: $(READY)
	$(BIN)/pytest -s tests/faults

# The Slurm profile on a Slurm of one node that the tests start and stop (Debian: slurm-wlm and munge), and a dry run of
# the Kubernetes profile; what cannot be installed is skipped with the reason.
test-cluster: $(READY)
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e ".[slurm,kubernetes]"
	$(BIN)/pytest -rs tests/cluster

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(READY): pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Prunelab needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e ".[test]"
	touch $(READY)

# Pins what is installed now. CUDA and Triton wheels exist for Linux alone.
lock: $(READY)
	$(BIN)/python -m pip freeze --all --exclude pip --exclude-editable --disable-pip-version-check \
	  | sed -E "/^(nvidia-|cuda-|triton==)/ s/$$/ ; sys_platform == 'linux'/" > requirements.lock

clean:
	rm -rf .venv .venvs results .snakemake build *.egg-info
