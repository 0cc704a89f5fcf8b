#!/bin/sh
# Speech translation with the 3B model on CoVoST 2 from the hub: on one adapter a state for each target language, and
# one of recognition. Variables as in demo-state-tuning.sh, and
#   pairs="en_de en_ja"                     directions
#   OP=text sh demo/speech-translation.sh   trains states that read the transcripts, in proj_dir/text: the cascade's half
#   OP=eval sh demo/speech-translation.sh   scores, beside the cascade if that is there
# A recorded experiment; not run with real weights.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)

sets() { # of this split, separated by commas
    for pair in ${pairs-en_de en_ja en_zh-CN}; do
        printf '%s' "${comma-}covost:$pair:$1"
        comma=,
    done
}

export proj_dir="${proj_dir-$root/output/translation}" eval_data="${eval_data-$(sets test)}"
case ${OP:-train} in
train) export train_data="${train_data-$(sets train),${asr_data-librispeech:train-clean-100}}" ;;
text)
    export OP=train proj_dir="$proj_dir/text" train_data="${train_data-$(sets train)}"
    set -- --input text "$@"
    ;;
eval) if [ -d "$proj_dir/text" ]; then set -- --cascade "$proj_dir/text" "$@"; fi ;;
esac
exec sh "$root/demo/demo-state-tuning.sh" "$@"
