#!/bin/sh
# Print what is said in audio files, with the weights in proj_dir. Edit the variables, or set them before calling, also
# those of with_weights in env.sh; files, folders and flags of predict.py may follow:
#   proj_dir=output/quickstart sh demo/demo-predict.sh speech.wav talks/ --output_format srt
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)

proj_dir=${proj_dir-$root/output}
file_path=${file_path-}

. "$root/demo/env.sh"
with_weights predict --file_path "$file_path" "$@"
