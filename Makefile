# `make help` lists the targets. All but gpu-suite and kernel-hub run in a virtual environment that they make and keep up to date.

PYTHON ?= python3
VENV ?= .venv
# More for pip, e.g. PIP_ARGS="--index-url ..." for another build of torch.
PIP_ARGS ?=
# More for pytest, e.g. PYTEST_ARGS="tests/kernels -x".
PYTEST_ARGS ?=
OUT ?= gpu-suite
# Of bench-compare: BASELINE=new, and where a baseline is kept.
BASELINE ?=
SAVED := .benchmarks/baseline.json
# Of fuzz.
MINUTES ?= 60
SEED ?=
# Of the tests: SLOW=1 runs those marked slow as well, as CI does.
SLOW ?= $(CI)
# Of the GPU suite: PIECES="stem step" (default: all), TESTS=on, off or only, LIMIT in seconds.
PIECES ?=
TESTS ?= on
LIMIT ?= 570
# Of its compiled kernels: the file, the GPU's compute capability, how many are compiled at once.
CACHE ?= gpu-cache.tar.xz
ARCH ?= 90
JOBS ?= 2
# Of the kernel hub: the repository that the written files name.
REPO_ID ?=
# Of the wheels: for which Pythons (commands or paths), with GPU code or without (CUDA=off), tried beside what (torch==...).
PYTHONS ?= python3.11 python3.12 python3.13
CUDA ?= on
TRY_WITH ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_BENCH := $(VENV)/.installed-bench
INSTALLED_DOCS := $(VENV)/.installed-docs
INSTALLED_RELEASE := $(VENV)/.installed-release
# The extension, and what decides what is in it.
BUILT := $(VENV)/.built
SOURCES := CMakeLists.txt $(wildcard cmake/*.cmake csrc/*.cpp csrc/*.map csrc/fbank/*)
DATA := data/quickstart
RUN := runs/quickstart
CLASSIFIER := runs/quickstart-classifier
GALLERY := runs/gallery
SOUND := $(DATA)/test/bird/bird-00000.wav
DEMO := docs/build/demo

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart gallery test fuzz lint format bench bench-compare gpu-suite gpu-cache kernel-hub docs demo notebook linkcheck wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The steps are the commands a user would type.
quickstart: $(BUILT) ## synthesise sounds, pre-train a tiny model, probe it, fine-tune it, use it (minutes)
	$(BIN)/cat-audio synth $(DATA) --seed 0 --force
	$(BIN)/cat-audio pretrain recipes/quickstart.yaml --overwrite
	$(BIN)/cat-audio probe $(RUN) --train $(DATA)/train.jsonl --valid $(DATA)/valid.jsonl --test $(DATA)/test.jsonl \
	    --pooling both --require-better --figures --no-cache
	$(BIN)/cat-audio finetune recipes/quickstart-classifier.yaml --overwrite
	$(BIN)/cat-audio predict $(CLASSIFIER) $(SOUND) --picture $(CLASSIFIER)/figures/prediction.png --overwrite
	$(BIN)/cat-audio similar $(DATA)/test $(SOUND) --encoder $(RUN) --whiten

gallery: quickstart ## draw the pictures of docs/gallery.md and docs/visible-only.md anew
	$(BIN)/cat-audio probe $(RUN) --train $(DATA)/train.jsonl --valid $(DATA)/valid.jsonl --test $(DATA)/test.jsonl \
	    --probe linear,gated --layers all --figures --no-cache --out $(GALLERY)/probe.json
	$(BIN)/cat-audio evaluate $(CLASSIFIER) $(DATA)/test.jsonl --figures -o $(GALLERY)/evaluation --overwrite
	$(BIN)/cat-audio experiment visible --data $(DATA) --out $(GALLERY) --overwrite
	cp $(RUN)/figures/patches.png $(RUN)/figures/loss.png $(RUN)/figures/embeddings.png docs/figures/gallery
	cp $(GALLERY)/figures/layers.png $(GALLERY)/evaluation/figures/confusion.png docs/figures/gallery
	cp $(CLASSIFIER)/figures/prediction.png docs/figures/gallery
	cp $(GALLERY)/visible/figures/reach.png $(GALLERY)/visible/figures/halo.png docs/figures

test: $(BUILT) $(if $(SLOW),$(INSTALLED_RELEASE)) ## run the tests; those marked gpu where there is one, those marked slow with SLOW=1
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal $(if $(SLOW),,-m "not slow") $(PYTEST_ARGS)

fuzz: $(BUILT) ## odd manifests, audio files and recipes, for MINUTES=60, from seeds that are new (or SEED=N)
	CAT_FUZZ_SECONDS=$$(($(MINUTES) * 60)) CAT_FUZZ_SEED=$(or $(SEED),$$(date +%s)) \
	    $(BIN)/python -m pytest -q -n auto --maxprocesses 3 tests/test_fuzz.py

lint: $(INSTALLED) ## ruff (rules and format), and mypy on both packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED_BENCH) $(BUILT) ## benchmarks on this machine
	$(BIN)/python -m benchmarks

bench-compare: $(BUILT) ## is any operator or a step slower than the baseline? BASELINE=new takes one, as the first call does
	$(BIN)/python -m benchmarks.regressions $(if $(filter new,$(BASELINE))$(if $(wildcard $(SAVED)),,new),--save)

# Installs nothing: for a bare machine with a GPU, run by the Python it is given.
gpu-suite: ## GPU tests and benchmarks, results into OUT=DIR; also PIECES="..." TESTS=on|off|only LIMIT=SECONDS
	$(PYTHON) -m benchmarks.suite --out $(OUT) --pieces "$(PIECES)" --tests $(TESTS) --limit $(LIMIT) \
	    $(if $(wildcard $(CACHE)),--cache $(CACHE))

gpu-cache: $(INSTALLED) ## compile what gpu-suite launches into CACHE=FILE, for ARCH=90; needs no GPU
	$(BIN)/python -m benchmarks.cache make $(CACHE) --arch $(ARCH) --processes $(JOBS)

# Installs nothing, compiles nothing.
kernel-hub: OUT := $(if $(filter file,$(origin OUT)),kernel-hub,$(OUT))
kernel-hub: ## the operators for Hugging Face's kernel hub, into OUT=DIR; REPO_ID=me/cat-kernels names the repository
	$(PYTHON) -m release.kernel_hub $(OUT) $(if $(REPO_ID),--repo-id $(REPO_ID))

docs: $(INSTALLED_DOCS) ## build the documentation into docs/build
	$(BIN)/sphinx-build -q -W --keep-going $(if $(wildcard $(DEMO)/index.html),-t demo) docs docs/build
	@echo "docs/build/index.html"

linkcheck: $(INSTALLED_DOCS) ## ask every address that the documentation links to; needs a network
	$(BIN)/sphinx-build -q -b linkcheck docs docs/build/linkcheck

wheel: $(INSTALLED_RELEASE) ## wheels for any Linux with glibc 2.28 and the source distribution into dist/; PYTHONS="..." CUDA=off
	$(BIN)/python -m release.wheels --out dist --pythons $(PYTHONS) --cuda $(CUDA) $(if $(TRY_WITH),--try-with $(TRY_WITH))

# In a folder of its own, and back only when all cells have run.
notebook: $(INSTALLED_DOCS) ## run docs/notebook.ipynb, and keep what it prints in it (minutes)
	@folder=$$(mktemp -d) && cp docs/notebook.ipynb $$folder && \
	    PYTHONWARNINGS="ignore:IProgress not found" PATH="$(abspath $(BIN)):$$PATH" $(BIN)/jupyter-execute --inplace --timeout=3600 $$folder/notebook.ipynb && \
	    cp $$folder/notebook.ipynb docs/notebook.ipynb && rm -r $$folder

demo: $(BUILT) ## what quickstart trained, as a page for a browser; docs made afterwards link to it
	$(BIN)/cat-audio export $(CLASSIFIER) --web $(DEMO)

clean: ## remove the virtual environment, build leftovers and what quickstart made
	rm -rf $(VENV) build dist *.egg-info docs/build docs/api docs/repository $(DATA) $(RUN) $(CLASSIFIER) $(GALLERY)
	rm -f cat_kernels/_C*.so cat_kernels/_build.json
	rm -rf .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is younger than all that decides what is installed, so a second run costs nothing. torchaudio has a folder of
# its own: the tests read one of its files, and where PyTorch has no CUDA it breaks those that import it (transformers).
# Of the harnesses the tests run the checkers, and of the kernel hub the loader: they need little of what the packages ask for
# (tensorflow, torchaudio, sigstore).
$(INSTALLED): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "cat-kernels needs Python 3.11 or newer, and '$(PYTHON)' is not; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
	    echo "$(PYTHON) could not make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; \
	    rm -rf $(VENV); exit 1; }
	@echo "Installing into $(VENV); the first time takes minutes."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[train,test,clap]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt --no-deps --upgrade \
	    --target $(VENV)/others torchaudio
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt --no-deps \
	    xares hearvalidator loguru kernels || echo "without harnesses' checkers and kernels; tests that run them are skipped" >&2
	@touch $@

# The installation has built the extension; a source that changed since then builds it again, in place.
$(BUILT): $(SOURCES) | $(INSTALLED)
	@test -n "$$(find $(SOURCES) -newer $(INSTALLED))" || exit 0; $(BIN)/python setup.py -q build_ext --inplace
	@touch $@

$(INSTALLED_BENCH): $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[bench]'
	@touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[docs]'
	@touch $@

$(INSTALLED_RELEASE): $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[release]'
	@touch $@
