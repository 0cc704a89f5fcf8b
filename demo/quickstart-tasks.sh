#!/usr/bin/env bash
# Every task once, on any computer: one adapter and a state for each task of a small synthetic world, learned in one run;
# then their scores on voices and sentences that nothing was trained on, beside the same questions read as text.
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

export load_model=tiny proj_dir="${proj_dir-$root/output/quickstart-tasks}" epoch_count="${epoch_count-8}"
data=$proj_dir/data

. "$root/demo/env.sh"
setup_environment

echo "== 1 of 4: synthesising the corpus into $data"
"$python" -m rwkv_speech.synthetic.make_tasks --out "$data" \
    --train "${train_lines-2400}" --valid "${valid_lines-80}" --test "${test_lines-640}"
for part in train valid test; do grep '"task": "qa"' "$data/$part.jsonl" >"$data/$part-qa.jsonl"; done

echo "== 2 of 4: training one adapter and a state for each task"
OP=train train_data=$data/train.jsonl valid_data=$data/valid.jsonl sh "$root/demo/demo-state-tuning.sh"

echo "== 3 of 4: training a state that reads the questions as text: what the language model could answer at best"
OP=train train_data=$data/train-qa.jsonl valid_data=$data/valid-qa.jsonl proj_dir=$proj_dir/text epoch_count=20 \
    sh "$root/demo/demo-state-tuning.sh" --input text

echo "== 4 of 4: scoring unseen speakers and sentences"
OP=eval eval_data=$data/test.jsonl sh "$root/demo/demo-state-tuning.sh"
OP=eval eval_data=$data/test-qa.jsonl proj_dir=$proj_dir/text sh "$root/demo/demo-state-tuning.sh" --input text
