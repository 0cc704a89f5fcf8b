#!/bin/sh
# A page to speak with the model in a browser: a microphone or files, text as it is recognised, conversations that the
# state remembers; with the weights in proj_dir, else those of a quickstart. Edit the variables, or set them before
# calling, also those of with_weights in env.sh; flags of `python -m rwkv_speech page` may follow:
#   proj_dir=output/quickstart-tasks sh demo/demo-chat.sh --port 8080
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)

if [ -z "${proj_dir-}" ]; then
    for proj_dir in "$root/output" "$root/output/quickstart-tasks" "$root/output/quickstart"; do
        if [ -f "$proj_dir/best.safetensors" ]; then break; fi
    done
fi
host=${host-127.0.0.1}
port=${port-7860}

. "$root/demo/env.sh"
with_weights page --host "$host" --port "$port" "$@"
