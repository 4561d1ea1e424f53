#!/usr/bin/env bash
# Installs what `make dist` has made into empty environments and asks a server of each one question: the wheel, and the
# sdist where there is no compiler, which serves on the reference path and says so in one line. Versions are those of
# constraints.txt.
set -euo pipefail

dist=$(realpath "${1:-dist}")
versions=$(dirname "$(realpath "$0")")/../constraints.txt
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

ask() { # ask VENV LOG: start a server of the bundled model and wait for an answer
  local port=$((20000 + RANDOM % 20000)) server answer
  (cd "$work" && exec env -u PYTHONPATH "$1/bin/dashinfer_vlm_serve" --port "$port" --kv-cache-gib 0.1) > "$2" 2>&1 &
  server=$!
  for _ in $(seq 300); do
    curl -fs "http://localhost:$port/ready" > /dev/null && break
    kill -0 "$server" || { cat "$2"; return 1; }
    sleep 1
  done
  answer=$(curl -fsS "http://localhost:$port/v1/completions" -H "Content-Type: application/json" \
    -d '{"prompt": "a", "max_tokens": 4}') || { cat "$2"; return 1; }
  kill "$server"
  wait "$server"
  [[ $answer == *'"finish_reason"'* ]] || { echo "$answer"; return 1; }
}

"$python" -m venv "$work/wheel"
"$work/wheel/bin/pip" install --quiet --constraint "$versions" "$dist"/*.whl
ask "$work/wheel" "$work/wheel.log"
if grep -q "no native kernels" "$work/wheel.log"; then
  echo "the wheel has no native kernels" >&2
  exit 1
fi
echo "the wheel serves, with native kernels"

"$python" -m venv "$work/sdist"
CC=/nonexistent/cc CXX=/nonexistent/c++ "$work/sdist/bin/pip" install --quiet --constraint "$versions" "$dist"/*.tar.gz
ask "$work/sdist" "$work/sdist.log"
warnings=$(grep -c "no native kernels" "$work/sdist.log" || true)
[ "$warnings" = 1 ] || { echo "$warnings warnings instead of one:" >&2; cat "$work/sdist.log" >&2; exit 1; }
echo "the sdist serves without a compiler, with one warning"
