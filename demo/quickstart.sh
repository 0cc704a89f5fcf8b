#!/usr/bin/env bash
# Everything once, on any computer: environment, synthetic speech, training, scores on voices never heard, a prediction.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

run=${proj_dir-$root/output/quickstart}
train_utterances=${train_utterances-1200}
test_utterances=${test_utterances-240}
epoch_count=${epoch_count-5}
micro_bsz=${micro_bsz-16}

. "$root/demo/env.sh"
setup_environment

echo "== 1 of 4: synthesising the corpus into $run/data"
"$python" -m rwkv_speech.synthetic.make_corpus --out "$run/data" \
    --train "$train_utterances" --test "$test_utterances"

echo "== 2 of 4: training the adapter and the initial state of the tiny model"
"$python" "$root/train.py" --load_model tiny --proj_dir "$run" \
    --train_data "$run/data/train.jsonl" --valid_data "$run/data/valid.jsonl" \
    --device cpu --micro_bsz "$micro_bsz" --epoch_count "$epoch_count" --epoch_save "$epoch_count" \
    --lr_adapter 1e-3 --lr_state 1e-2 --warmup_steps 30 --workers 0

echo "== 3 of 4: scoring voices that training never heard: first without training, then with it"
"$python" "$root/eval.py" --load_model tiny --proj_dir "$run" --device cpu --micro_bsz "$micro_bsz" \
    --eval_data "$run/data/test.jsonl" --untrained 1 --max_new_tokens 20
"$python" "$root/eval.py" --proj_dir "$run" --device cpu --micro_bsz "$micro_bsz" --eval_data "$run/data/test.jsonl"

"$python" - "$run" <<'PYTHON_END'
import json
import pathlib
import sys

run = pathlib.Path(sys.argv[1])
untrained, trained = (json.loads((run / f"{name}-test.json").read_text())["wer"] for name in ("untrained", "eval"))
print(f"== WER on voices never heard: {100 * untrained:.2f} % untrained, {100 * trained:.2f} % trained")
PYTHON_END

echo "== 4 of 4: predicting one file"
file=$run/data/test/00000.flac
"$python" "$root/predict.py" --proj_dir "$run" --device cpu --file_path "$file"
echo "   (spoken in $file: $(sed -n '1s/.*"text": "\([^"]*\)".*/\1/p' "$run/data/test.jsonl"))"
