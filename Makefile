# The first command in a fresh clone may be any of these: each makes .venv and installs what it needs.
PYTHON ?= python3.11
TORCH  ?= torch==2.13.0
BIN    := .venv/bin

.PHONY: demo docs test test-e2e test-all test-scale lint format clean \
	benchmark-retrieval benchmark-surfaces benchmark-public benchmark-speed benchmark-serving benchmark-index \
	benchmark-scale benchmark-daily benchmark-short

demo: .venv/demo            ## simulate, pretrain, compare, finetune, recommend: minutes on two cores
	$(BIN)/python examples/demo.py

test: .venv/test            ## all tests but the slow ones, with coverage
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow and not e2e and not scale" --cov --cov-report=term

test-e2e: .venv/test        ## every snippet of README and docs, as a reader runs it; the wheel; the page in chromium, if it is there
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m e2e

test-all: .venv/test        ## the slow ones too
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not scale"

test-scale: .venv/scale     ## Spark, Milvus, FSDP2 and sharded encoding, on this machine
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "scale and not slow"

docs: .venv/docs            ## the pages, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: .venv/dev             ## style, types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

benchmark-retrieval: .venv/demo   ## the figures of docs/benchmarks.md; resumable
	$(BIN)/python benchmarks/retrieval.py

benchmark-surfaces: .venv/demo    ## the figures of docs/ablations.md; resumable
	$(BIN)/python benchmarks/surfaces.py

benchmark-serving: .venv/test     ## the figures of docs/serving.md, against a server on loopback: about ten minutes
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/serving.py

benchmark-public: .venv/test $(if $(filter-out peers,$(ROW)),,.venv-peers)   ## MovieLens-1M, Amazon: ROW=ml1m MINUTES=5 for one of them, stopped by the clock
	$(BIN)/python benchmarks/public_sets.py $(if $(ROW),--row $(ROW)) $(if $(MINUTES),--minutes $(MINUTES))

benchmark-speed: .venv/test .venv-peers   ## the figures of docs/performance.md: ROW=loader for one of them, once more
	OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 HF_HUB_OFFLINE=1 \
	$(BIN)/python benchmarks/speed.py $(if $(ROW),--row $(ROW) --again)

benchmark-short: .venv/test .venv-peers   ## the short rows of the results once more, in some ten minutes: none may be worse
	OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 HF_HUB_OFFLINE=1 \
	$(BIN)/python benchmarks/short.py

.venv-peers:                      ## RecTools, which needs an older NumPy than this library
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet "$(TORCH)"
	.venv-peers/bin/python -m pip install --quiet "rectools[torch]==0.19.*"

benchmark-index: .venv/demo       ## the figures of docs/item-index.md: 10^6 vectors against faiss flat, 10^7 in memory and time
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/index_size.py

benchmark-scale: .venv/demo       ## figures that docs/scale.md is derived from: prepare at 10^7 and 10^8 rows, a catalogue of 10^6
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/catalogue_size.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/prepare_size.py

benchmark-daily: .venv/demo       ## the figures of docs/daily.md: warm start against retraining on KuaiRand; resumable
	$(BIN)/python benchmarks/daily.py

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$(TORCH)"

.venv/demo: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[report]" && touch $@

.venv/test: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[test]" && touch $@

.venv/docs: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[docs]" && touch $@

.venv/scale: .venv/test     ## Spark needs Java
	command -v java > /dev/null || (apt-get update && apt-get install --yes openjdk-17-jre-headless)
	$(BIN)/python -m pip install --quiet --editable ".[test,spark,milvus]" && touch $@

.venv/dev: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[dev]" && touch $@

clean:
	rm -rf .venv .venv-peers site demo pinrec-base
