#!/usr/bin/env bash
# OpenVINO GenAI's continuous batching, to be measured beside this project in one run.
#   openvino_genai.sh install VENV                                       into a virtual environment of its own
#   openvino_genai.sh prepare VENV CHECKPOINT [PRECISION]                converts the checkpoint: int8 (default), int4, fp16
#   openvino_genai.sh serve VENV CHECKPOINT PORT [PRECISION]             on loopback, as the model "model"
# It has no server of its own in Python: openvino_server.py is a thin one. Its scheduler is set as its documentation
# recommends for throughput: dynamic split fuse, prefix caching, 2,048 tokens a step.
set -euo pipefail

GENAI=2026.4.1.0
OPTIMUM_INTEL=2.2.0 # this and what follows is for the conversion alone
OPTIMUM=2.3.0
NNCF=3.4.0
TRANSFORMERS=4.57.6
TORCH=2.13.0
HERE=$(cd "$(dirname "$0")" && pwd)

install() {
  local venv=$1
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/pip" install -q -U pip
  "$venv/bin/pip" install -q "torch==$TORCH"
  "$venv/bin/pip" install -q "openvino-genai==$GENAI" "optimum==$OPTIMUM" "nncf==$NNCF" "transformers==$TRANSFORMERS" pillow
  "$venv/bin/pip" install -q --no-deps "optimum-intel==$OPTIMUM_INTEL" # without torchvision, which wants another torch
}

converted() { # VENV CHECKPOINT PRECISION
  echo "$1/models/$(basename "$2")-$3"
}

prepare() {
  local venv=$1 checkpoint=$2 precision=${3:-int8} out
  out=$(converted "$venv" "$checkpoint" "$precision")
  [ "$out/openvino_language_model.bin" -nt "$checkpoint/model.safetensors" ] && return
  rm -rf "$out" "$out.unfinished"
  HF_HUB_OFFLINE=1 "$venv/bin/optimum-cli" export openvino --model "$checkpoint" --task image-text-to-text \
    --weight-format "$precision" "$out.unfinished"
  mv "$out.unfinished" "$out"
}

serve() {
  local venv=$1 checkpoint=$2 port=$3 precision=${4:-int8}
  exec "$venv/bin/python" "$HERE/openvino_server.py" "$(converted "$venv" "$checkpoint" "$precision")" \
    --port "$port" --kv-cache-gib "${KV_CACHE_GIB:-4}"
}

case "${1:-}" in
install | prepare | serve) "$@" ;;
*)
  sed -n '2,7s/^# \?//p' "$0"
  exit 2
  ;;
esac
