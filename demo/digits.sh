#!/usr/bin/env bash
# Real speech on the tiny model: demo/digits.sh FOLDER, where FOLDER holds train.jsonl and valid.jsonl.
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
data=${1:-}

. "$root/demo/env.sh"
needs_manifests "$data" train valid
export load_model="${load_model-tiny}" proj_dir="${proj_dir-$root/output/digits}" train_data="$data/train.jsonl" \
    valid_data="" eval_data="$data/valid.jsonl" epoch_count="${epoch_count-16}" warmup_steps="${warmup_steps-50}"
OP=train sh "$root/demo/demo-state-tuning.sh"
OP=eval sh "$root/demo/demo-state-tuning.sh"
