#!/bin/sh
# Train (OP=train) or score (OP=eval) the adapter and the initial state. Edit the variables, or set them before calling:
#   OP=eval sh demo/demo-state-tuning.sh
# As they stand they are the published setting: 3B, LibriSpeech 960 h, 4 GPUs, 4 utterances each.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)

OP=${OP:-train}
case $OP in
train) load_model=${load_model-$root/RWKV-x060-World-3B-v2.1-20240417-ctx4096.pth} ;;
eval) load_model=${load_model-} ;; # empty: as the checkpoint says
*)
    echo "error: OP=$OP, expected train or eval" >&2
    exit 2
    ;;
esac

# Sizes are read from the model's file when left empty; a value that contradicts the file is an error.
case $load_model in
*-3B-*) n_layer=${n_layer-32} n_embd=${n_embd-2560} ;;
tiny | tiny7) # the embedded default, on any computer, or its RWKV-7; without train_data it learns synthetic speech
    proj_dir=${proj_dir-$root/output/$load_model} micro_bsz=${micro_bsz-16} device=${device-cpu} grad_cp=${grad_cp-0}
    lr_adapter=${lr_adapter-1e-3} warmup_steps=${warmup_steps-30} workers=${workers-0}
    eval_data=${eval_data-$proj_dir/data/test.jsonl}
    if [ -z "${train_data-}" ]; then
        synthetic=$proj_dir/data
        train_data=$synthetic/train.jsonl valid_data=${valid_data-$synthetic/valid.jsonl}
    fi
    ;;
esac
n_layer=${n_layer-}
n_embd=${n_embd-}
encoder=${encoder-} # empty: microsoft/wavlm-large, or the tiny one
proj_dir=${proj_dir-$root/output}
wkv6=${wkv6-auto}

# 281,241 utterances / (4 x 4) are 17,577 steps an epoch; empty: all of the data, counted from the set itself.
micro_bsz=${micro_bsz-4}
epoch_steps=${epoch_steps-}
epoch_count=${epoch_count-5}
epoch_save=${epoch_save-1}
ctx_len=${ctx_len-1024}
device=${device-4}
grad_cp=${grad_cp-1}
lr_adapter=${lr_adapter-1e-4}
lr_state=${lr_state-1e-2}
warmup_steps=${warmup_steps-100}
ctc=${ctc-0}
workers=${workers-2}

train_data=${train_data-librispeech:train-960}
valid_data=${valid_data-}
eval_data=${eval_data-librispeech:test-clean,librispeech:test-other}

. "$root/demo/env.sh"
setup_environment

if [ "$OP" = eval ]; then
    # One device, whatever the number used for training: a --device that follows may name more.
    case $device in *[!0-9]*) ;; *) device=auto ;; esac
    exec "$python" "$root/eval.py" --load_model "$load_model" --encoder "$encoder" --proj_dir "$proj_dir" \
        --n_layer "$n_layer" --n_embd "$n_embd" --micro_bsz "$micro_bsz" --device "$device" --wkv6 "$wkv6" \
        --eval_data "$eval_data" "$@"
fi
if [ -n "${synthetic-}" ] && [ ! -f "$train_data" ]; then
    echo "== no train_data is named: synthesising speech into $synthetic"
    "$python" -m rwkv_speech.synthetic.make_corpus --out "$synthetic"
fi
exec "$python" "$root/train.py" --load_model "$load_model" --encoder "$encoder" --proj_dir "$proj_dir" \
    --n_layer "$n_layer" --n_embd "$n_embd" --micro_bsz "$micro_bsz" --epoch_steps "$epoch_steps" \
    --epoch_count "$epoch_count" --epoch_save "$epoch_save" --ctx_len "$ctx_len" --device "$device" --wkv6 "$wkv6" \
    --grad_cp "$grad_cp" --lr_adapter "$lr_adapter" --lr_state "$lr_state" --warmup_steps "$warmup_steps" \
    --ctc "$ctc" --workers "$workers" --train_data "$train_data" --valid_data "$valid_data" "$@"
