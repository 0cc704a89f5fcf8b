#!/usr/bin/env bash
# Everything once, on any computer: environment, synthetic speech, training, scores on unseen speakers, a prediction;
# load_model=tiny7 takes the embedded RWKV-7.
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

export load_model="${load_model-tiny}" ctc="${ctc-1}" proj_dir="${proj_dir-$root/output/quickstart}"
data=$proj_dir/data
export train_data="$data/train.jsonl" valid_data="$data/valid.jsonl" eval_data="$data/test.jsonl"

. "$root/demo/env.sh"
setup_environment

echo "== 1 of 4: synthesising the corpus into $data"
"$python" -m rwkv_speech.synthetic.make_corpus --out "$data" \
    --train "${train_utterances-1200}" --test "${test_utterances-240}"

echo "== 2 of 4: training the adapter, the initial state and the CTC head of the tiny model"
OP=train sh "$root/demo/demo-state-tuning.sh"
# Without the head there is nothing to calibrate, and after less training nearly all words are wrong.
if [ "$ctc" = 1 ] && [ "${train_utterances-1200}" -ge 1000 ]; then
    "$python" -m rwkv_speech calibrate "$proj_dir" --data "$valid_data"
fi

echo "== 3 of 4: scoring unseen speakers: first without training, then with it"
OP=eval sh "$root/demo/demo-state-tuning.sh" --untrained 1 --max_new_tokens 20
OP=eval sh "$root/demo/demo-state-tuning.sh"

"$python" - "$proj_dir" <<'PYTHON_END'
import json
import pathlib
import sys

run = pathlib.Path(sys.argv[1])
newest = lambda name: max(run.glob(f"eval-{name}-test-*.json"), key=lambda path: path.stat().st_mtime)
untrained, trained = (json.loads(newest(name).read_text())["tasks"]["asr"]["wer"] for name in ("untrained", "best"))
print(f"== WER on unseen speakers: {100 * untrained:.2f} % untrained, {100 * trained:.2f} % trained")
PYTHON_END

echo "== 4 of 4: predicting one file"
file_path=$data/test/00000.flac sh "$root/demo/demo-predict.sh"
echo "   (spoken in $data/test/00000.flac: $(sed -n '1s/.*"text": "\([^"]*\)".*/\1/p' "$data/test.jsonl"))"
