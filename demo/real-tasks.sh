#!/usr/bin/env bash
# Real recordings, several tasks and five languages on one adapter: demo/real-tasks.sh FOLDER
# FOLDER holds prompts/, stamps/ and emotion/ with manifests as asr.train.jsonl, st.train.jsonl, lid.train.jsonl and the same
# with valid. The base model is a small one of demo/pretrain-small.sh in `base`, the encoder a Whisper's in `encoder`.
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
data=${1:-}
base=${base-$root/output/small}
export encoder="${encoder-openai/whisper-tiny.en}" proj_dir="${proj_dir-$root/output/real-tasks}"

. "$root/demo/env.sh"
needs_manifests "$data" prompts/asr.train stamps/asr.train emotion/emotion.train
if [ ! -f "$base/rwkv6.safetensors" ]; then
    echo "base=$base: found no rwkv6.safetensors there; make one with demo/pretrain-small.sh, or name its folder" >&2
    exit 2
fi
export load_model="$base/rwkv6.safetensors" device="${device-cpu}" grad_cp=0 micro_bsz="${micro_bsz-16}" \
    lr_adapter="${lr_adapter-1e-3}" lr_state="${lr_state-1e-2}" warmup_steps="${warmup_steps-100}" workers="${workers-2}"
set -- --vocab_file "$base/vocab.txt" --stack 4 --adapter_hidden 1024 --speed 0.9,1,1.1
p=$data/prompts s=$data/stamps

echo "== 1 of 3: recognition, translation and the language, of prompts and stamps"
OP=train epoch_count="${epoch_count-6}" \
    train_data="$p/asr.train.jsonl@3,$p/words.train.jsonl@3,$s/asr.train.jsonl@3,$p/st.train.jsonl@3,$p/words-st.train.jsonl,$s/st.train.jsonl,$p/lid.train.jsonl,$p/voices-lid.train.jsonl,$s/lid.train.jsonl" \
    valid_data="" sh "$root/demo/demo-state-tuning.sh" "$@"

echo "== 2 of 3: emotion and sex, on an adapter of their own"
OP=train epoch_count="${emotion_epochs-20}" proj_dir=$proj_dir/emotion valid_data="" \
    train_data="$data/emotion/emotion.train.jsonl,$data/emotion/sex.train.jsonl" sh "$root/demo/demo-state-tuning.sh" "$@"

echo "== 3 of 3: scores of what was held back"
OP=eval eval_data="$p/asr.valid.jsonl,$p/words.valid.jsonl,$s/asr.valid.jsonl,$p/st.valid.jsonl,$p/voices-lid.valid.jsonl,$s/lid.valid.jsonl" \
    sh "$root/demo/demo-state-tuning.sh" --beam "${beam-4}"
OP=eval proj_dir=$proj_dir/emotion eval_data="$data/emotion/emotion.valid.jsonl,$data/emotion/sex.valid.jsonl" \
    sh "$root/demo/demo-state-tuning.sh"
