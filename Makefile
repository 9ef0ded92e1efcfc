# `make` alone shows what there is. Every target sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo-output
TESTS_MIN := tests/data tests/evaluation tests/retrieval tests/training/test_checkpoint.py tests/training/test_loop.py \
	$(addprefix tests/test_,$(addsuffix .py,configuration conversion encoder golden heads open_qa reader remote_code \
	serving tokenization))
QUESTIONS := mixlm/sample/ko_questions.json

# Before anything is installed: what pip says of an older Python names packages, and comes after gigabytes.
define require-python
python=$(1); "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "$$python is not Python 3.11 or newer; delete its environment, if it is one, and give another: make PYTHON=python3.12 ..." >&2; exit 2; }
endef

.DEFAULT_GOAL := help
.PHONY: help browser demo test test-all test-min lint format package bench bench-growth clean

help:  ## Show this help
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# constraints.txt pins the tested set. torch comes first, and one that is there already is kept: where pip would fetch the build
# for CUDA, several gigabytes, and no GPU is wanted, install it into .venv beforehand, from the CPU index that pytorch.org names.
$(VENV)/installed: setup.py constraints.txt
	@$(call require-python,$$(test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON)))
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a minute or two) ..."
	@$(BIN)/pip install --quiet $$(grep '^torch==' constraints.txt)
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[plot,dev]'
	@touch $@

# For tests/browser, which are skipped without it; nothing else needs it.
browser:
	@command -v chromedriver >/dev/null || ! command -v apt-get >/dev/null || test "$$(id -u)" != 0 || \
		timeout 300 sh -c 'apt-get -qq update && apt-get -qq install -y chromium chromium-driver fonts-nanum' \
		>/dev/null 2>&1 || true

demo: $(VENV)/installed  ## From text to answers on the bundled articles: pretrain, fine-tune, index, ask (minutes)
	@rm -rf $(DEMO)
	$(BIN)/mixlm tokenizer train --corpus_path mixlm/sample --vocab_size 4000 --out $(DEMO)/tokenizer
	$(BIN)/python run_pretraining.py examples/demo.json
	$(BIN)/python run_mrc.py examples/demo_reader.json
	$(BIN)/python run_ict.py examples/demo_retriever.json
	$(BIN)/mixlm encode --model $(DEMO)/retriever --passages $(QUESTIONS) --out $(DEMO)/vectors
	$(BIN)/mixlm index --vectors $(DEMO)/vectors --out $(DEMO)/index
	@# Articles 0 to 51 were trained on. What is chosen now is chosen on 52 to 58, and judged on 59 to 65.
	$(BIN)/mixlm tune --index $(DEMO)/index --queries $(QUESTIONS) --qrels $(QUESTIONS) --articles 52:59
	$(BIN)/mixlm ask --index $(DEMO)/index --reader $(DEMO)/reader --questions $(QUESTIONS) --articles 52:59 --tune
	$(BIN)/mixlm ask --index $(DEMO)/index --reader $(DEMO)/reader --questions $(QUESTIONS) --articles 59:66
	$(BIN)/mixlm report $(DEMO)/tiny
	$(BIN)/mixlm report $(DEMO)/reader
	$(BIN)/mixlm report $(DEMO)/retriever
	$(BIN)/mixlm fill-mask --model $(DEMO)/tiny "제주도는 우리나라에서 가장 [MASK] 섬으로, 한반도 남쪽 바다에 있다."
	@echo "Two questions that the reader was trained on, and one about an article that it was not:"
	$(BIN)/mixlm ask --index $(DEMO)/index --reader $(DEMO)/reader "우주에 김치를 가져간 한국인은 누구인가?"
	$(BIN)/mixlm ask --index $(DEMO)/index --reader $(DEMO)/reader "로마에서 기독교를 믿을 자유가 인정된 해는 언제인가?"
	$(BIN)/mixlm ask --index $(DEMO)/index --reader $(DEMO)/reader "20세기에 탄소를 대신하여 필라멘트로 쓰인 것은?"
	@echo "Ask more on a web page: $(BIN)/mixlm serve --index $(DEMO)/index --reader $(DEMO)/reader"

test: $(VENV)/installed browser  ## Run every test that takes seconds
	$(BIN)/python -m pytest -n 2

test-all: $(VENV)/installed browser  ## Run the slow tests too
	$(BIN)/python -m pytest -n 2 -m ''

# In an environment of its own. The loop, the scripts, the Hub and the exports are tested with the newest alone.
test-min: setup.py constraints-min.txt  ## Run tests of models, data and retrieval with the oldest versions allowed
	@$(call require-python,$$(test -x $(VENV)-min/bin/python && echo $(VENV)-min/bin/python || echo $(PYTHON)))
	@test -x $(VENV)-min/bin/python || $(PYTHON) -m venv $(VENV)-min
	$(VENV)-min/bin/pip install --quiet $$(grep '^torch==' constraints-min.txt)
	$(VENV)-min/bin/pip install --quiet --constraint constraints-min.txt --editable '.[korean,retrieval,demo,plot]' \
		$$(grep -E '^(hypothesis|parameterized|pytest|pytest-timeout|pytest-xdist|pytrec_eval-terrier)==' constraints.txt)
	$(VENV)-min/bin/python -m pytest -n 2 $(TESTS_MIN)

lint: $(VENV)/installed  ## Check style, spelling and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/typos
	$(BIN)/mypy

format: $(VENV)/installed  ## Mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

package: $(VENV)/installed  ## Build the wheel and the source archive into dist/
	$(BIN)/python -m build

bench: $(VENV)/installed  ## Measure speed and memory: benchmarks/results.json and its README (half an hour)
	$(BIN)/python benchmarks/run.py

bench-growth: $(VENV)/installed  ## Measure how the cost of a step grows: benchmarks/growth.png and its README (8 minutes)
	$(BIN)/python benchmarks/growth.py

clean:  ## Remove what the targets made
	rm -rf $(VENV) $(VENV)-min $(DEMO) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
