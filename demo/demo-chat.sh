#!/bin/sh
# A page to speak with the model in a browser: a microphone or files, text as it is recognised, conversations that the
# state remembers; with the weights in proj_dir, else those of a quickstart. Edit the variables, or set them before
# calling; flags of `python -m rwkv_speech page` may follow:
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
device=${device-auto}
wkv6=${wkv6-auto}

# Empty: as the checkpoint says. Published files say nothing: they need load_model.
load_model=${load_model-}
encoder=${encoder-}
n_layer=${n_layer-}
n_embd=${n_embd-}

. "$root/demo/env.sh"
setup_environment
exec "$python" -m rwkv_speech page --load_model "$load_model" --encoder "$encoder" --proj_dir "$proj_dir" \
    --n_layer "$n_layer" --n_embd "$n_embd" --device "$device" --wkv6 "$wkv6" --host "$host" --port "$port" "$@"
