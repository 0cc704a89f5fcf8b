#!/bin/sh
# Answer requests for transcripts over HTTP, in the API of openai's audio client, with the weights in proj_dir. Edit the
# variables, or set them before calling; flags of `python -m rwkv_speech serve` may follow:
#   proj_dir=output/quickstart sh demo/demo-server.sh --api_keys keys.txt
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)

proj_dir=${proj_dir-$root/output}
host=${host-127.0.0.1}
port=${port-8000}
device=${device-auto}
wkv6=${wkv6-auto}

# Empty: as the checkpoint says. Published files say nothing: they need load_model.
load_model=${load_model-}
encoder=${encoder-}
n_layer=${n_layer-}
n_embd=${n_embd-}

. "$root/demo/env.sh"
setup_environment
exec "$python" -m rwkv_speech serve --load_model "$load_model" --encoder "$encoder" --proj_dir "$proj_dir" \
    --n_layer "$n_layer" --n_embd "$n_embd" --device "$device" --wkv6 "$wkv6" --host "$host" --port "$port" "$@"
