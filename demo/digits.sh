#!/usr/bin/env bash
# Real speech on the tiny model: demo/digits.sh FOLDER, where FOLDER holds train.jsonl and valid.jsonl.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
data=${1:-}

run=${proj_dir-$root/output/digits}
epoch_count=${epoch_count-16}
micro_bsz=${micro_bsz-16}

for part in train valid; do
    if [ ! -f "$data/$part.jsonl" ]; then
        echo "usage: demo/digits.sh FOLDER: expected the manifests train.jsonl and valid.jsonl in FOLDER;" \
            "'$data/$part.jsonl' is not there" >&2
        exit 2
    fi
done
. "$root/demo/env.sh"
setup_environment

echo "== training on $data/train.jsonl"
"$python" "$root/train.py" --load_model tiny --proj_dir "$run" --train_data "$data/train.jsonl" \
    --device cpu --micro_bsz "$micro_bsz" --epoch_count "$epoch_count" --epoch_save "$epoch_count" \
    --lr_adapter 1e-3 --lr_state 1e-2 --warmup_steps 50 --workers 0

echo "== scoring $data/valid.jsonl"
"$python" "$root/eval.py" --proj_dir "$run" --checkpoint "$run/last.safetensors" --device cpu --micro_bsz "$micro_bsz" \
    --eval_data "$data/valid.jsonl"
