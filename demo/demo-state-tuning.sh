#!/bin/sh
# Train (OP=train) or score (OP=eval) the adapter and the initial state. Edit the variables, or set them before calling:
#   OP=eval sh demo/demo-state-tuning.sh
# As they stand they are the published setting: 3B, LibriSpeech 960 h, 4 GPUs, 4 utterances each.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)

OP=${OP:-train}
load_model=${load_model-$root/RWKV-x060-World-3B-v2.1-20240417-ctx4096.pth}
encoder=${encoder-microsoft/wavlm-large}
proj_dir=${proj_dir-$root/output}

# Read from the model's file when left empty; a value that contradicts the file is an error.
n_layer=${n_layer-32}
n_embd=${n_embd-2560}

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

train_data=${train_data-librispeech:train-960}
valid_data=${valid_data-}
eval_data=${eval_data-librispeech:test-clean,librispeech:test-other}

python=python3
if [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; fi

case $OP in
train)
    exec "$python" "$root/train.py" --load_model "$load_model" --encoder "$encoder" --proj_dir "$proj_dir" \
        --n_layer "$n_layer" --n_embd "$n_embd" --micro_bsz "$micro_bsz" --epoch_steps "$epoch_steps" \
        --epoch_count "$epoch_count" --epoch_save "$epoch_save" --ctx_len "$ctx_len" --device "$device" \
        --grad_cp "$grad_cp" --lr_adapter "$lr_adapter" --lr_state "$lr_state" \
        --train_data "$train_data" --valid_data "$valid_data" "$@"
    ;;
eval)
    # Scores come from one device, whatever the number used for training.
    if [ "$device" != cpu ]; then device=auto; fi
    exec "$python" "$root/eval.py" --load_model "$load_model" --encoder "$encoder" --proj_dir "$proj_dir" \
        --n_layer "$n_layer" --n_embd "$n_embd" --micro_bsz "$micro_bsz" --device "$device" \
        --eval_data "$eval_data" "$@"
    ;;
*)
    echo "error: OP=$OP, expected train or eval" >&2
    exit 2
    ;;
esac
