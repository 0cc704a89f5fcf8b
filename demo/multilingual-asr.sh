#!/bin/sh
# Recognition in several languages with the 3B model on Multilingual LibriSpeech from the hub: one adapter, a state for
# each language. Variables as in demo-state-tuning.sh, and
#   languages="german french"   of those that the corpus has
#   OP=eval sh demo/multilingual-asr.sh
# WavLM-Large was pretrained on English alone: the encoder is Whisper's.
# A recorded experiment; not run with real weights.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)

sets() { # of this split, separated by commas
    for language in ${languages-german dutch french spanish italian portuguese polish}; do
        printf '%s' "${comma-}mls:$language:$1"
        comma=,
    done
}

export proj_dir="${proj_dir-$root/output/multilingual}"
export train_data="${train_data-$(sets train)}" valid_data="${valid_data-$(sets dev)}"
export eval_data="${eval_data-$(sets test)}"
if [ "${OP:-train}" = train ]; then
    export encoder="${encoder-openai/whisper-large-v3}"
    set -- --state_by lang "$@"
fi
exec sh "$root/demo/demo-state-tuning.sh" "$@"
