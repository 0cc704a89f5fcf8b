#!/bin/sh
# Print what is said in audio files, with the weights in proj_dir. Edit the variables, or set them before calling; files,
# folders and flags of predict.py may follow:
#   proj_dir=output/quickstart sh demo/demo-predict.sh speech.wav talks/ --output_format srt
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)

proj_dir=${proj_dir-$root/output}
file_path=${file_path-}
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
