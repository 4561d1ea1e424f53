#!/usr/bin/env bash
# Builds the CPU image on a base of Debian's own bootstrap, without a registry or a daemon, runs it, and asks it the
# question of the documentation: `make test-image`. Needs root, buildah, mmdebstrap and curl.
set -euo pipefail

cd "$(dirname "$0")/.."
work=$PWD/build/image
port=${PORT:-8765}
base=$work/base.tar
# what pip on this machine is set up to use: its settings, and the folders and files that they name
mounts=()
named=$(python3 -m pip config list | grep -oE "(file://)?/[A-Za-z0-9_./-]+" | sed "s,^file://,,;s,/simple$,," || true)
for path in /etc/pip.conf ~/.config/pip/pip.conf /etc/ssl/certs/ca-certificates.crt $named; do
  [ ! -e "$path" ] || mounts+=(--volume "$path:$path:ro")
done

buildah() {
  command buildah --root "$work/storage" --runroot "$work/run" --storage-driver overlay "$@"
}

mkdir -p "$work"
if [ ! -f "$base" ]; then
  mmdebstrap --format=tar --variant=minbase --include=python3,python3-dev,python3-venv,ca-certificates bookworm "$base.part"
  mv "$base.part" "$base"
fi
if ! buildah inspect --type image dashinfer-vlm-base > /dev/null 2>&1; then
  printf 'FROM scratch\nADD base.tar /\n' > "$work/Dockerfile.base"
  buildah bud --isolation chroot -t dashinfer-vlm-base -f "$work/Dockerfile.base" "$work"
fi
buildah bud --layers --isolation chroot --format docker --build-arg BASE=dashinfer-vlm-base --build-arg TORCH_INDEX_URL= \
  "${mounts[@]}" -t dashinfer-vlm -f deploy/Dockerfile .

# docker run --shm-size 1g -p 8000:8000 IMAGE --model ... --host 0.0.0.0: the entry point, the user and the environment
# of the image, with the host's network; the bundled model stands for one that would be downloaded
container=$(buildah from dashinfer-vlm)
server=
end() {
  [ -z "$server" ] || kill -- "-$server" 2> /dev/null || true # the server is a grandchild in the same group
  wait
  buildah rm "$container" > /dev/null
}
trap end EXIT
read -ra entry <<< "$(buildah inspect --format '{{range .OCIv1.Config.Entrypoint}}{{.}} {{end}}' "$container")"
user=$(buildah inspect --format '{{.OCIv1.Config.User}}' "$container")
[ "$user" != 0 ] && [ -n "$user" ] || { echo "the image runs as root" >&2; exit 1; }
setsid buildah --root "$work/storage" --runroot "$work/run" --storage-driver overlay run --isolation chroot \
  "$container" -- "${entry[@]}" \
  --served-model-name qwen/Qwen2-VL-2B-Instruct --host 0.0.0.0 --port "$port" --kv-cache-gib 0.1 &
server=$!
until curl -fs "http://localhost:$port/ready" > /dev/null; do
  kill -0 "$server" || { echo "the server in the image has ended" >&2; exit 1; }
  sleep 1
done
picture=iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg==
answer=$(curl -fsS "http://localhost:$port/v1/chat/completions" -H "Content-Type: application/json" -d '{
  "model": "qwen/Qwen2-VL-2B-Instruct", "max_completion_tokens": 16, "top_p": 0.5, "temperature": 0.1,
  "frequency_penalty": 1.05, "messages": [{"role": "user", "content": [{"type": "text", "text": "Describe the image."},
  {"type": "image_url", "image_url": {"url": "data:image/png;base64,'"$picture"'"}}]}]}')
echo "$answer"
[[ $answer == *'"finish_reason"'* ]] || exit 1
health=$(buildah inspect --format '{{.Docker.Config.Healthcheck.Test}}' "$container")
[[ $health == *health* ]] || { echo "the image has no health check" >&2; exit 1; }
buildah run --isolation chroot --env DASHINFER_PORT="$port" "$container" -- python3 -c \
  "import os, urllib.request as u; u.urlopen('http://127.0.0.1:%s/health' % os.environ['DASHINFER_PORT'], timeout=4)"
echo "the image answers, as user $user"
