#!/usr/bin/env bash
# Real speech on the tiny model: demo/digits.sh FOLDER, where FOLDER holds train.jsonl and valid.jsonl.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
data=${1:-}
run=${2:-$root/output/digits}
for part in train valid; do
    if [ ! -f "$data/$part.jsonl" ]; then
        echo "usage: demo/digits.sh FOLDER [RUN]: expected the manifests train.jsonl and valid.jsonl in FOLDER;" \
            "'$data/$part.jsonl' is not there" >&2
        exit 2
    fi
done
. "$root/demo/env.sh"
setup_environment

echo "== training on $data/train.jsonl"
"$python" "$root/train.py" --load_model tiny --proj_dir "$run" --train_data "$data/train.jsonl" \
    --device cpu --micro_bsz 16 --epoch_count 16 --epoch_save 16 \
    --lr_adapter 1e-3 --lr_state 1e-2 --warmup_steps 50 --workers 0

echo "== scoring $data/valid.jsonl"
"$python" "$root/eval.py" --proj_dir "$run" --checkpoint "$run/last.safetensors" --device cpu --micro_bsz 16 \
    --eval_data "$data/valid.jsonl"
