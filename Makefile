# make demo    quantize the demo model, measure it beside the original, let it speak
# make test    check, then the test suite, all but what follows
# make test-kernels   the GPU kernels: Triton interprets them, and compiles them for GPUs that are not there
# make test-slow   what takes minutes: quality on the demo model, memory, processes of their own
# make fuzz    20,000 broken and hostile inputs for everything that reads a file, with a table of what became of them
# make check   lint, format and types
# make test-oldest   what make test runs, with the oldest transformers that is supported, in an environment of its own
# make test-loaders  other programs load what ptq writes, and ptq what they write: GPTQModel, llm-compressor, bitsandbytes, llama.cpp; builds some of them
# make clean   remove what the others made, the virtual environment included
#
# Each sets up .venv by itself. Another interpreter: make PYTHON=/path/to/python3

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DEMO := demo-output
SOURCES := ptqcli kernels tests scripts

# Nothing below needs a network once the packages are installed; a look at the hub would only be slow.
export HF_HUB_OFFLINE := 1
# What Python compiled and pytest made of the assertions is kept: made anew, it costs each of the suite's processes seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow test-kernels test-oldest test-loaders fuzz check clean

demo: $(READY)
	$(BIN)/ptq quantize --algo gptq --wbits 4 --group-size 128 --output $(DEMO) --overwrite
	$(BIN)/ptq eval $(DEMO) --ppl builtin
	$(BIN)/ptq generate $(DEMO) "The built-in function" --max-new-tokens 40

test: check
	$(BIN)/pytest -m "not triton and not slow and not loaders"

test-slow: $(READY)
	$(BIN)/pytest -m "slow and not triton and not loaders"

test-kernels: $(READY)
	$(BIN)/pytest -m triton

OLDEST := .venv-oldest
test-oldest: $(READY)
	@$(OLDEST)/bin/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(OLDEST)
	@grep -viE '^(transformers|tokenizers|huggingface)' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(OLDEST)/constraints.txt \
	  --editable '.[test]' 'transformers==5.17.*'
	$(OLDEST)/bin/pytest -m "not triton and not loaders"

LOADERS := .venv-loaders
test-loaders: $(READY)
	@$(LOADERS)/bin/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(LOADERS)
	$(LOADERS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]' \
	  setuptools wheel sentencepiece protobuf
	$(LOADERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement tests/loaders/requirements.txt
	$(LOADERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-binary gptqmodel \
	  gptqmodel==7.6.0
	$(LOADERS)/bin/pytest -n0 -m loaders tests/loaders

FUZZ_INPUTS := 20000
fuzz: $(READY)
	$(BIN)/python tests/fuzz/run.py $(FUZZ_INPUTS)

check: $(READY)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

clean:
	rm -rf .venv $(OLDEST) $(LOADERS) build dist $(DEMO) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || \
	  { echo "$(PYTHON) not found: install Python 3.10 to 3.13, or name one with make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "$$($(PYTHON) --version) does not do: ptqcli needs 3.10 to 3.13; name one with make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "setting up .venv (the first time downloads PyTorch)"
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@
