#!/bin/sh
# Print what is said in an audio file, with the weights in proj_dir. Edit the variables, or set them before calling:
#   proj_dir=output/quickstart file_path=speech.wav sh demo/demo-predict.sh
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)

proj_dir=${proj_dir-$root/output}
file_path=${file_path-path/to/your/audio/file}
device=${device-auto}
wkv6=${wkv6-auto}

# Empty: as the checkpoint says. Published files say nothing: they need load_model.
load_model=${load_model-}
encoder=${encoder-}
n_layer=${n_layer-}
n_embd=${n_embd-}

. "$root/demo/env.sh"
setup_environment
exec "$python" "$root/predict.py" --load_model "$load_model" --encoder "$encoder" --proj_dir "$proj_dir" \
    --n_layer "$n_layer" --n_embd "$n_embd" --device "$device" --wkv6 "$wkv6" --file_path "$file_path" "$@"
