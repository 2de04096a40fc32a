PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup browser demo bench test lint

# Everything is installed once; constraints.txt pins what it was tested with.
setup: .venv/installed
.venv/installed: pyproject.toml constraints.txt
	@echo "installing into .venv: about 6 GB, a few minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Pre-train on built-in images for about three minutes on two cores, then ask what the encoder knows.
demo: setup
	$(BIN)/mirl pretrain --config recipes/pretrain/demo.yaml --out runs/demo --overwrite
	$(BIN)/python examples/read_out.py runs/demo

# Tests look at the report and the app in a real browser, and say that they skip where there is none.
browser:
	@if ! command -v chromium >/dev/null && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		echo "installing chromium for the tests"; \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium \
		>/dev/null; } || echo "it could not be installed: tests that need a browser will skip"; fi

# A process for each core and one more, because some wait (for a browser, for runs that they kill), each with one
# thread: more threads than cores make PyTorch ten times slower.
test: setup browser
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --dist loadfile

# Speed and memory, against the peers, on the machine at hand: an hour on two cores, best with nothing beside it.
bench: setup
	$(BIN)/python bench/step.py --models vit_s_54 --compile
	$(BIN)/python bench/step.py --models vit_b_12 vit_b_24 vit_b_48 --precisions bf16 --decoder_depths 2
	$(BIN)/python bench/step.py --models vit_s_12 vit_s_24 vit_s_48 vit_s_96 vit_s_200 --segments 2 --batches 8 --precisions bf16 --no_peer
	$(BIN)/python bench/data.py
	$(BIN)/python bench/plan.py
	$(BIN)/python bench/startup.py
	$(BIN)/python bench/paths.py
	$(BIN)/python bench/checkpoints.py
	$(BIN)/python bench/kills.py

lint: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
