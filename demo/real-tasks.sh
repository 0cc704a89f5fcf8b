#!/usr/bin/env bash
# Real recordings, several tasks and five languages: demo/real-tasks.sh FOLDER
# FOLDER holds prompts/, stamps/ and emotion/ with manifests as asr.train.jsonl, st.train.jsonl, lid.train.jsonl and the same
# with valid. The base model is a small one of demo/pretrain-small.sh in `base`, the encoder a Whisper's in `encoder`.
# With `texts`, the folders that the base model was made of, eSpeak NG speaks 2,000 lines of each language beside; with
# `voices`, a file of commands, other synthesizers take turns with it (--voices of synthetic.say_texts).
# Start it again and it is resumed. On two cores it takes about two hours.
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
data=${1:-}
base=${base-$root/output/small}
texts=${texts-}
run=${proj_dir-$root/output/real-tasks}
export encoder="${encoder-openai/whisper-tiny.en}"

. "$root/demo/env.sh"
needs_manifests "$data" prompts/asr.train stamps/asr.train emotion/emotion.train
lm=$base/rwkv6.safetensors
[ -f "$lm" ] || lm=$base/rwkv7.safetensors
if [ ! -f "$lm" ]; then
    echo "base=$base: found neither rwkv6.safetensors nor rwkv7.safetensors there; make one with" \
        "demo/pretrain-small.sh, or name its folder" >&2
    exit 2
fi
setup_environment
export load_model="$lm" device="${device-cpu}" grad_cp=0 workers="${workers-2}" valid_data=""
# whisper-tiny.en knows English alone: of other languages its earlier layers say more than the last one.
set -- --vocab_file "$base/vocab.txt" --stack 3 --adapter_hidden 1024 --encoder_layers "${encoder_layers-2,3,4}" \
    --feature_cache "$run/frames" --feature_dtype float16
p=$data/prompts s=$data/stamps

spoken=
if [ -n "$texts" ]; then
    spoken=,$run/spoken/train.jsonl
    if [ ! -f "${spoken#,}" ]; then
        "$python" -m rwkv_speech.synthetic.say_texts --texts "$texts" --out "$run/spoken" --count 2000 \
            --voices "${voices-}"
    fi
fi

# A few voices in one studio teach little about other people: copies at other speeds, in rooms and on telephones.
if [ ! -f "$run/varied/train.jsonl" ]; then
    "$python" -m rwkv_speech.synthetic.vary_recordings --copies "${copies-3}" --out "$run/varied" \
        --data "$p/asr.train.jsonl,$p/words.train.jsonl,$s/asr.train.jsonl"
fi

# By seconds, so that short recordings are many in a batch: with 16 in each the CTC head heard them badly.
echo "== 1 of 4: recognition, a state for each language, and the CTC head that listens with the language model"
OP=train proj_dir=$run/asr lr_adapter=1e-3 lr_state=1e-2 epoch_count="${asr_epochs-40}" epoch_save=40 \
    epoch_steps="${epoch_steps-25}" ctc=1 \
    train_data="$p/asr.train.jsonl@3,$p/words.train.jsonl,$s/asr.train.jsonl@2,$run/varied/train.jsonl$spoken" \
    sh "$root/demo/demo-state-tuning.sh" "$@" --state_by lang --batch_seconds 68 \
    --ctc_epochs "${ctc_epochs-150}" --ctc_layers 5 --ctc_hidden 320 --lr_ctc 3e-3

echo "== 2 of 4: translation and the name of the language, from that adapter"
OP=train proj_dir=$run/tasks micro_bsz=16 lr_adapter=1e-3 lr_state=1e-2 epoch_count="${task_epochs-3}" \
    train_data="$p/st.train.jsonl,$p/lid.train.jsonl,$p/voices-lid.train.jsonl,$s/lid.train.jsonl" \
    sh "$root/demo/demo-state-tuning.sh" "$@" --init_from "$run/asr/last.safetensors"

echo "== 3 of 4: emotion and sex, with an adapter of their own"
OP=train proj_dir=$run/emotion micro_bsz=4 lr_adapter=2e-3 lr_state=2e-2 epoch_count="${emotion_epochs-13}" \
    train_data="$data/emotion/emotion.train.jsonl,$data/emotion/sex.train.jsonl" \
    sh "$root/demo/demo-state-tuning.sh" "$@" --stack 10 --encoder_layers ""

echo "== 4 of 4: scores of what was held back"
export OP=eval micro_bsz="${slots-16}"
set -- --vocab_file "$base/vocab.txt"
for part in "$p/asr" "$p/words" "$s/asr"; do
    proj_dir=$run/asr eval_data=$part.valid.jsonl \
        sh "$root/demo/demo-state-tuning.sh" "$@" --beam "${beam-8}" --ctc_weight "${ctc_weight-1}"
done
proj_dir=$run/tasks eval_data="$p/st.valid.jsonl,$p/lid.valid.jsonl,$p/voices-lid.valid.jsonl,$s/lid.valid.jsonl" \
    sh "$root/demo/demo-state-tuning.sh" "$@"
proj_dir=$run/emotion eval_data="$data/emotion/emotion.valid.jsonl,$data/emotion/sex.valid.jsonl" \
    sh "$root/demo/demo-state-tuning.sh" "$@"
