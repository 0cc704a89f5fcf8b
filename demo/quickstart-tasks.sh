#!/usr/bin/env bash
# Every task once, on any computer: one adapter and a state for each task of a small synthetic world, learned in one run;
# then their scores on voices and sentences that nothing was trained on, beside the same questions read as text.
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

export load_model="${load_model-tiny}" proj_dir="${proj_dir-$root/output/quickstart-tasks}"
export epoch_count="${epoch_count-12}"
data=$proj_dir/data

. "$root/demo/env.sh"
setup_environment

echo "== 1 of 4: synthesising the corpus into $data"
"$python" -m rwkv_speech.synthetic.make_tasks --out "$data" \
    --train "${train_lines-3200}" --valid "${valid_lines-160}" --test "${test_lines-640}"
for part in train valid test; do grep '"task": "qa"' "$data/$part.jsonl" >"$data/$part-qa.jsonl"; done

echo "== 2 of 4: training one adapter and a state for each task"
OP=train train_data=$data/train.jsonl valid_data=$data/valid.jsonl sh "$root/demo/demo-state-tuning.sh" \
    --feature_cache "$proj_dir/frames" --transcribe_first qa

echo "== 3 of 4: training a state that reads the questions as text: what the language model could answer at best"
OP=train train_data=$data/train-qa.jsonl valid_data=$data/valid-qa.jsonl proj_dir=$proj_dir/text epoch_count=10 \
    sh "$root/demo/demo-state-tuning.sh" --input text

echo "== 4 of 4: scoring unseen speakers and sentences"
OP=eval eval_data=$data/test.jsonl sh "$root/demo/demo-state-tuning.sh"
OP=eval eval_data=$data/test-qa.jsonl proj_dir=$proj_dir/text sh "$root/demo/demo-state-tuning.sh" --input text

"$python" - "$proj_dir" <<'PYTHON_END'
import json
import pathlib
import sys

run = pathlib.Path(sys.argv[1])
newest = lambda folder: max(folder.glob("eval-best-*.json"), key=lambda path: path.stat().st_mtime)
heard, read = newest(run), newest(run / "text")
tasks, texts = (json.loads(path.read_text())["tasks"] for path in (heard, read))
rows = [json.loads(line) for line in heard.with_suffix(".jsonl").read_text().splitlines()]
last = {row["index"]: row for row in rows if row["task"] == "chat"}.values()
recalled = sum(row["ref"] == row["hyp"] for row in last) / len(last)
qa, ceiling = tasks["qa"]["exact_match"], texts["qa"]["exact_match"]
print("== unseen speakers, unseen sentences")
for lang, found in tasks["asr"]["by"]["language"].items():
    print(f"   recognition, {lang}            WER {100 * found['wer']:6.2f} %")
for pair, found in tasks["st"]["by"]["direction"].items():
    print(f"   translation, {pair}     BLEU {found['bleu']:6.2f}   chrF {found['chrf']:.2f}")
print(f"   questions         exact match {100 * qa:6.2f} %   read as text {100 * ceiling:.2f} %")
print(f"   topics               accuracy {100 * tasks['topic']['accuracy']:6.2f} %")
print(f"   conversation           recall {100 * recalled:6.2f} %")
PYTHON_END
