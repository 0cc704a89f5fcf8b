#!/bin/sh
# Print what is said in an audio file, with the weights in proj_dir. Edit the variables, or set them before calling:
#   file_path=speech.wav sh demo/demo-predict.sh
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)

load_model=${load_model-$root/RWKV-x060-World-3B-v2.1-20240417-ctx4096.pth}
encoder=${encoder-microsoft/wavlm-large}
proj_dir=${proj_dir-$root/output}
file_path=${file_path-path/to/your/audio/file}
device=${device-auto}

# Read from the model's file when left empty; a value that contradicts the file is an error.
n_layer=${n_layer-32}
n_embd=${n_embd-2560}

python=python3
if [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; fi

exec "$python" "$root/predict.py" --load_model "$load_model" --encoder "$encoder" --proj_dir "$proj_dir" \
    --n_layer "$n_layer" --n_embd "$n_embd" --device "$device" --file_path "$file_path" "$@"
