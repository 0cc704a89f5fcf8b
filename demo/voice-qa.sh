#!/bin/sh
# Voice questions and answers with the 3B model, out of any corpus with transcripts: demo/voice-qa.sh FOLDER, where
# FOLDER holds train.jsonl, valid.jsonl and test.jsonl. The frozen text model answers the transcripts; the states of qa
# and of recognition are then learned on one adapter, qa's by KL to that same model. Variables as in
# demo-state-tuning.sh.
#   OP=eval demo/voice-qa.sh FOLDER
# A recorded experiment: rates and temperature are Ultravox's; not run with real weights.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
data=${1:-}

. "$root/demo/env.sh"
needs_manifests "$data" train valid test
shift
export proj_dir="${proj_dir-$root/output/voice-qa}"
made=$proj_dir/data
export eval_data="${eval_data-$made/test.jsonl,$data/test.jsonl}"
if [ "${OP:-train}" = train ]; then
    export load_model="${load_model-$root/RWKV-x060-World-3B-v2.1-20240417-ctx4096.pth}"
    setup_environment
    form=${form-user} # how the text model is asked; a template with {text} for one that knows no chat
    for part in train valid test; do
        "$python" -m rwkv_speech make_answers --data "$data/$part.jsonl" --output "$made/$part.jsonl" \
            --load_model "$load_model" --form "$form" --micro_bsz "${answers_at_once-64}"
    done
    export train_data="${train_data-$made/train.jsonl,$data/train.jsonl@0.5}"
    export valid_data="${valid_data-$made/valid.jsonl}"
    export lr_adapter="${lr_adapter-2e-3}" warmup_steps="${warmup_steps-1000}" epoch_count="${epoch_count-2}"
    set -- --loss "${loss-kl}" --kl_form "$form" "$@"
fi
exec sh "$root/demo/demo-state-tuning.sh" "$@"
