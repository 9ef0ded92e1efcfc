# `make` alone shows what there is. Every target sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo-output

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format bench bench-growth clean

help:  ## Show this help
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# constraints.txt pins the tested set; torch comes first and exactly, because a range would fetch a CUDA build.
$(VENV)/installed: setup.py constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a minute or two) ..."
	@$(BIN)/pip install --quiet $$(grep '^torch==' constraints.txt)
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[plot,dev]'
	@# For tests/browser, which are skipped without it; nothing else needs it.
	@command -v chromedriver >/dev/null || ! command -v apt-get >/dev/null || test "$$(id -u)" != 0 || \
		timeout 300 sh -c 'apt-get -qq update && apt-get -qq install -y chromium chromium-driver fonts-nanum' \
		>/dev/null 2>&1 || true
	@touch $@

demo: $(VENV)/installed  ## Pretrain a tiny MixLM on the bundled corpus and fill a masked Korean sentence
	@rm -rf $(DEMO)
	$(BIN)/mixlm tokenizer train --corpus_path mixlm/sample --vocab_size 4000 --out $(DEMO)/tokenizer
	$(BIN)/python run_pretraining.py examples/demo.json
	$(BIN)/mixlm report $(DEMO)/tiny
	$(BIN)/mixlm fill-mask --model $(DEMO)/tiny "제주도는 우리나라에서 가장 [MASK] 섬으로, 한반도 남쪽 바다에 있다."

test: $(VENV)/installed  ## Run every test that takes seconds
	$(BIN)/python -m pytest -n 2

test-all: $(VENV)/installed  ## Run the slow tests too
	$(BIN)/python -m pytest -n 2 -m ''

lint: $(VENV)/installed  ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed  ## Mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed  ## Measure speed and memory: benchmarks/results.json and its README (half an hour)
	$(BIN)/python benchmarks/run.py

bench-growth: $(VENV)/installed  ## Measure how the cost of a step grows: benchmarks/growth.png and its README (8 minutes)
	$(BIN)/python benchmarks/growth.py

clean:  ## Remove what the targets made
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
