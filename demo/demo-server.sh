#!/bin/sh
# Answer requests for transcripts over HTTP, in the API of openai's audio client, with the weights in proj_dir. Edit the
# variables, or set them before calling, also those of with_weights in env.sh; flags of `python -m rwkv_speech serve` may
# follow:
#   proj_dir=output/quickstart sh demo/demo-server.sh --api_keys keys.txt
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)

proj_dir=${proj_dir-$root/output}
host=${host-127.0.0.1}
port=${port-8000}

. "$root/demo/env.sh"
with_weights serve --host "$host" --port "$port" "$@"
