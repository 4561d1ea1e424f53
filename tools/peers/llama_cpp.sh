#!/usr/bin/env bash
# llama.cpp's server, to be measured beside this project in one run.
#   llama_cpp.sh install VENV                                   built for this processor, from the source of a package
#   llama_cpp.sh prepare VENV CHECKPOINT [PRECISION]            converts the checkpoint: Q8_0 (default), Q4_0, BF16
#   llama_cpp.sh serve VENV CHECKPOINT PORT [PRECISION [more llama-server flags]]    on loopback, as the model "model"
# The encoder of pictures stays in BF16, as it is published. Eight slots share one KV cache.
set -euo pipefail

PACKAGE=llama-cpp-python
VERSION=0.3.36 # its source distribution holds that of llama.cpp
TORCH=2.13.0   # for the conversion alone
TRANSFORMERS=4.57.6

install() {
  local venv source
  venv=$(realpath -m "$1") # CMake does not find a tool by a relative path
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/pip" install -q -U pip
  "$venv/bin/pip" install -q "torch==$TORCH"
  "$venv/bin/pip" install -q "transformers==$TRANSFORMERS" sentencepiece protobuf safetensors pyyaml \
    cmake ninja
  "$venv/bin/pip" download -q --no-deps --no-binary "$PACKAGE" --dest "$venv" "$PACKAGE==$VERSION"
  tar -xzf "$venv/"llama_cpp_python-"$VERSION".tar.gz -C "$venv" --strip-components=2 --wildcards '*/vendor/llama.cpp'
  source=$venv/llama.cpp
  # a tokenizer that the converter does not know is taken as Qwen2's
  sed -i 's/raise NotImplementedError("BPE pre-tokenizer was not recognized.*/res = "qwen2"/' "$source/conversion/base.py"
  "$venv/bin/cmake" -S "$source" -B "$venv/build" -G Ninja -DCMAKE_MAKE_PROGRAM="$venv/bin/ninja" \
    -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF \
    -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF
  "$venv/bin/cmake" --build "$venv/build" --target llama-server llama-quantize
}

converted() { # VENV CHECKPOINT NAME
  echo "$1/models/$(basename "$2")-$3.gguf"
}

convert() { # VENV CHECKPOINT NAME [converter flags]
  local out
  out=$(converted "$1" "$2" "$3")
  [ "$out" -nt "$2/model.safetensors" ] && return
  "$1/bin/python" "$1/llama.cpp/convert_hf_to_gguf.py" "$2" --outtype bf16 --outfile "$out" "${@:4}"
}

prepare() {
  local venv=$1 checkpoint=$2 precision=${3:-Q8_0} whole out
  mkdir -p "$venv/models"
  convert "$venv" "$checkpoint" BF16
  convert "$venv" "$checkpoint" mmproj --mmproj
  whole=$(converted "$venv" "$checkpoint" BF16) out=$(converted "$venv" "$checkpoint" "$precision")
  [ "$out" -nt "$whole" ] || [ "$out" = "$whole" ] || "$venv/build/bin/llama-quantize" "$whole" "$out" "$precision"
}

serve() {
  local venv=$1 checkpoint=$2 port=$3 precision=${4:-Q8_0}
  exec "$venv/build/bin/llama-server" --model "$(converted "$venv" "$checkpoint" "$precision")" \
    --mmproj "$(converted "$venv" "$checkpoint" mmproj)" --alias model --host 127.0.0.1 --port "$port" \
    --threads "$(nproc)" --parallel 8 --ctx-size 32768 --kv-unified --no-webui "${@:5}"
}

case "${1:-}" in
install | prepare | serve) "$@" ;;
*)
  sed -n '2,6s/^# \?//p' "$0"
  exit 2
  ;;
esac
