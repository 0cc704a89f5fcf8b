"""What people get wrong on the command line: exit code 2 and at most three lines that name the flag or the file."""

import dataclasses
import importlib
import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from rwkv_speech.config import TrainConfig
from rwkv_speech.models.checkpoint import export_published, load_trained
from rwkv_speech.models.speech_lm import Parts, SpeechLM

ROOT = Path(__file__).parents[2]
LONG_NUMBER = "9" * 40

# Flags beside those that every case has; what is said must hold the flag's or file's name and the words behind "=>".
# In both {here} is the folder of `things`.
TRAIN = """
--lernrate 1 => --lernrate: there is no such flag
--lr_adaptor 1 => did you mean --lr_adapter
--epochs 3 => did you mean --epoch_
--lr 1 => --lr: there is no such flag
stray => 'stray': found a word that belongs to no flag
--wandb => --wandb: found no value, expected one
--epoch_save 0 => --epoch_save: found 0, expected a whole number at least 1
--save_steps 0 => --save_steps: found 0
--log_every 0 => --log_every: found 0
--accumulate 0 => --accumulate: found 0
--accumulate -2 => --accumulate: found -2
--workers -1 => --workers: found -1
--workers 100000 => --workers: found 100000
--epoch_steps -1 => --epoch_steps: found -1
--epoch_steps 0 => --epoch_steps: found 0
--epoch_count 0 => --epoch_count: found 0
--epoch_count 1.5 => --epoch_count: found '1.5', expected a whole number
--micro_bsz four => --micro_bsz: found 'four', expected a whole number
--micro_bsz 0 => --micro_bsz: found 0
--ctx_len -5 => --ctx_len: found -5
--batch_seconds 0 => --batch_seconds: found 0.0
--batch_seconds nan => --batch_seconds: found nan
--num_nodes 0 => --num_nodes: found 0
--seed -1 => --seed: found -1
--seed 4294967296 => --seed: found 4294967296, expected a whole number at least 0 and at most 4294967295
--warmup_steps {long} => --warmup_steps: found
--lr_adapter -1e-4 => --lr_adapter: found -0.0001, expected a number at least 0
--lr_state inf => --lr_state: found inf
--ctc 2 => --ctc: found 2
--ctc 1 --ctc_epochs 0 => --ctc_epochs: found 0
--ctc 1 --lr_ctc -1 => --lr_ctc: found -1.0
--ctc 1 --ctc_hidden 0 => --ctc_hidden: found 0
--ctc 1 --ctc_layers 0 => --ctc_layers: found 0
--lr_state 1e => --lr_state: found '1e'
--weight_decay nan => --weight_decay: found nan
--beta1 1 => --beta1: found 1.0, expected a number at least 0 and below 1
--beta2 -0.1 => --beta2: found -0.1
--adam_eps 0 => --adam_eps: found 0.0
--grad_clip -1 => --grad_clip: found -1.0
--max_bad -1 => --max_bad: found -1
--stack 0 => --stack: found 0
--adapter_hidden -3 => --adapter_hidden: found -3
--n_layer 0 => --n_layer: found 0
--n_layer 24 => --n_layer: given 24, but tiny has 4
--grad_cp 2 => --grad_cp: found 2, expected one of 0, 1
--plan yes => --plan: found 'yes', expected one of 0, 1
--plan 1 --plan_hours 0 => --plan_hours: found 0.0
--plan_hours 5 => --plan_hours: found without --plan
--plan 1 --ctx_len 5 => --ctx_len
--plan 1 --train_data= => --train_data
--resume maybe => --resume: found 'maybe', expected one of yes, no
--precision fp16 => --precision: found 'fp16'
--precision int4 => --precision: found 'int4', expected one of auto, bf16, fp32, int8, nf4
--peft dora => --peft: found 'dora', expected one of none, lora, state_offset
--peft lora --lora_rank 0 => --lora_rank: found 0
--peft lora --lora_alpha 0 => --lora_alpha: found 0.0
--peft lora --lora_dropout 1 => --lora_dropout: found 1.0
--peft lora --lora_targets key,head => --lora_targets: found 'key,head', expected some of receptance, key
--peft lora --lora_from {here}/gone => --lora_from: no such file or folder
--peft lora --lora_from {here}/texts => --lora_from: {here}/texts/adapter_config.json cannot be read
--peft lora --init_from {here}/run --freeze adapter => --peft lora: found with --freeze adapter
--train_parts ln --loss kl => --train_parts: found ln with --loss kl
--lora_rank 4 => --lora_rank: found without --peft lora
--peft state_offset --lora_rank 4 => --lora_rank: found without --peft lora
--peft state_offset --input text => --peft state_offset: found with --input text
--lora_targets key => --lora_targets: found without --peft lora
--train_parts head => --train_parts: found 'head', expected some of ln, time
--train_parts ln --input text => --train_parts ln: found with --input text
--lr_lm 1e-3 => --lr_lm: found without --peft or --train_parts
--train_parts ln --lr_lm -1 => --lr_lm: found -1.0
--lr_schedule linear => --lr_schedule: found 'linear', expected one of cosine, constant
--label_mode upper => --label_mode: found 'upper'
--strategy fsdp => --strategy: found 'fsdp'
--strategy deepspeed_stage_1 => --strategy: found 'deepspeed_stage_1' on a CPU, expected a GPU
--strategy deepspeed_stage_3 --valid_data {here}/good.jsonl => --valid_data: found
--wkv6 fast => --wkv6: found 'fast'
--wkv6 tiles => --wkv6: found 'tiles' on a CPU
--device tpu => --device: found 'tpu', expected auto, cpu
--device cpu:0 => --device: found 'cpu:0'
--device -1 => --device: found '-1'
--device 999 => --device: asked for 999 GPU(s)
--speed 0 => --speed: found '0', expected factors
--speed 0.9;1.1 => --speed: found '0.9;1.1'
--speed 0.9,,1.1 => --speed: found '0.9,,1.1'
--volume_db 6,-6 => --volume_db: found '6,-6', expected two numbers of dB, lowest and highest
--volume_db 6 => --volume_db: found '6'
--noise_snr_db 30,5 --noise_dir {here} => --noise_snr_db: found '30,5'
--noise_snr_db 0,20 => --noise_snr_db: found without --noise_dir
--noise_dir {here}/gone => --noise_dir: no such folder
--noise_dir {here}/texts => --noise_dir
--time_masks -1 => --time_masks: found -1
--time_masks 2 --time_mask_seconds 0 => --time_mask_seconds: found 0.0
--time_mask_seconds 0.5 => --time_mask_seconds: found without --time_masks
--freq_mask_hz 100 => --freq_mask_hz: found without --freq_masks
--freq_masks 1 --freq_mask_hz 9000 => --freq_mask_hz: found 9000.0
--feature_dtype float32 => --feature_dtype: found without --feature_cache
--feature_cache {here}/good.jsonl => --feature_cache: '{here}/good.jsonl' cannot be written to
--patience 2 => --patience: found without --valid_data
--keep_best 2 => --keep_best: found without --valid_data
--score_first 1 => --score_first: found without --valid_data
--min_delta 0.1 --valid_data {here}/good.jsonl => --min_delta: found without --patience
--min_delta -1 --patience 1 --valid_data {here}/good.jsonl => --min_delta: found -1.0
--patience -1 --valid_data {here}/good.jsonl => --patience: found -1
--wandb project => --wandb: found 'project' without the package wandb
--proj_dir {here}/good.jsonl => --proj_dir: '{here}/good.jsonl' cannot be written to
--proj_dir {here}/good.jsonl/run => --proj_dir: '{here}/good.jsonl/run' cannot be written to
--proj_dir /proc/run => --proj_dir: '/proc/run' cannot be written to
--load_model {here}/gone.pth => --load_model: no such file
--load_model {here} => --load_model: no such file
--load_model {here}/texts/a.pth => {here}/texts/a.pth: cannot be read
--encoder {here}/gone => --encoder: no such folder
--encoder {here}/good.jsonl => --encoder: no such folder
--encoder {here}/texts => encoder '{here}/texts': not a folder with a config.json
--vocab_file {here}/gone.txt => --vocab_file: no such file
--vocab_file {here}/good.jsonl => {here}/good.jsonl
--separator two_words_or_more => separator
--init_from {here}/gone => {here}/gone
--init_from {here}/texts/a.pth => {here}/texts/a.pth
--train_data {here}/gone.jsonl => --train_data: no such file or folder
--train_data {here}/good.jsonl, => --train_data: found an empty name
--train_data {here}/good.jsonl@0 => weight 0
--train_data s3:bucket:train => --train_data: no such file or folder 's3:bucket:train'
--train_data {here}/texts => {here}/texts
--train_data {here}/texts/a.pth => {here}/texts/a.pth
--train_data {here}/empty.jsonl => {here}/empty.jsonl
--train_data {here}/broken.jsonl => {here}/broken.jsonl
--train_data {here}/no_text.jsonl => {here}/no_text.jsonl
--train_data {here}/no_file.jsonl => {here}/no_file.jsonl
--train_data {here}/undecodable.jsonl --max_bad 0 => bad_files.jsonl
--train_data tar:{here}/gone-*.tar => gone
--train_data librispeech:train-961 => librispeech:train-961
--train_data hf:one => hf:one
--audio_column sound => --audio_column: has no effect
--valid_data {here}/gone.jsonl => --valid_data: no such file or folder
--valid_data {here}/good.jsonl@2 => --valid_data: no such file or folder
--epoch_steps 99 => --epoch_steps: given 99
--encoder_padding 31 => --encoder_padding: found 31
--encoder_layers 3,2 => --encoder_layers: found '3,2'
--state_by speaker => --state_by: found 'speaker'
--states Asr => --states: found 'Asr'
--input speech => --input: found 'speech'
--freeze encoder => --freeze: found 'encoder'
--freeze adapter => --freeze
--soft_prompt -1 => --soft_prompt: found -1
--loss mse => --loss: found 'mse'
--kl_temperature 0 --loss kl => --kl_temperature: found 0
"""
EVAL = """
--chekpoint x => did you mean --checkpoint
--checkpoint {here}/gone => --checkpoint: no such file or folder
--checkpoint {here}/nothing => {here}/nothing: found no trained weights there
--checkpoint {here}/good.jsonl => {here}/good.jsonl
--checkpoint {here}/run/last.safetensors --untrained 1 => --checkpoint: has no effect
--stack 4 => --stack: has no effect
--adapter_hidden 64 => --adapter_hidden: has no effect
--separator : => --separator: has no effect
--compare a => --compare: found 'a', expected two results
--compare a b c => --compare: found 'a b c', expected two results
--compare {here}/gone {here}/run => --compare: found none in '{here}/gone', expected one result
a.jsonl => 'a.jsonl': found a word that belongs to no flag
--normalizer lower => --normalizer: found 'lower', expected one of casefold
--checkpoint {here}/run/published.pth => --load_model
--eval_data {here}/gone.jsonl => --eval_data: no such file or folder
--eval_data ,, => --eval_data: found an empty name
--eval_data {here}/broken.jsonl => {here}/broken.jsonl
--eval_data {here}/undecodable.jsonl => bad_files.jsonl
--cascade {here}/nothing => {here}/nothing: found no trained weights there
--cascade {here}/run --input text => --cascade: has no effect with --input text
--language french! => --language: found 'french!', expected auto or the code of a language
--max_new_tokens 0 => --max_new_tokens: found 0
--micro_bsz 0 => --micro_bsz: found 0
--text_column words => --text_column: has no effect
--device 999 => --device: asked for 999 GPU(s)
--untrained yes => --untrained: found 'yes'
--proj_dir {here}/good.jsonl --checkpoint {here}/run => --proj_dir: '{here}/good.jsonl' cannot be written to
"""
PREDICT = """
--file x.wav => did you mean --file_path
--file_path {here}/a.wav,,{here}/a.wav => --file_path: found an empty name
--micro_bsz 0 --file_path {here}/a.wav => --micro_bsz: found 0
--max_new_tokens -1 {here}/a.wav => --max_new_tokens: found -1
--proj_dir {here}/gone {here}/a.wav => {here}/gone: found no trained weights there
--checkpoint {here}/gone {here}/a.wav => --checkpoint: no such file or folder
--stack 4 {here}/a.wav => --stack: has no effect
--device cpu:2 {here}/a.wav => --device: found 'cpu:2'
--vocab_file {here}/gone {here}/a.wav => --vocab_file: no such file
"""
OTHERS = {
    "rwkv_speech.synthetic.make_corpus": """
--train 5 => --out: found nothing
--out {here}/corpus --trian 5 => did you mean --train
--out {here}/corpus --test 0 => --test: found 0
--out {here}/good.jsonl/x --train 2 => {here}/good.jsonl/x
""",
    "rwkv_speech.synthetic.pretrain_lm": """
--out {here}/lm --steps 0 => --steps: found 0
--out {here}/lm => --texts: found nothing and --world 0
--out {here}/lm --world 1 --vocab 12 => --vocab: found '12'
--out {here}/lm --world 1 --n_embd 100 => --n_embd: found 100
--out {here}/lm --texts {here}/gone => --texts: {here}/gone
--out {here}/lm --texts {here}/texts@0 => weight 0
""",
    "rwkv_speech.synthetic.pretrain_encoder": """
--out {here}/encoder --hours -1 => --hours: found -1.0
""",
    "rwkv_speech.__main__": """
exprt => exprt
export {here}/gone {here}/x.pth => {here}/gone: found no trained weights there
average --checkpoints {here}/run => --output
average --checkpoints {here}/gone,{here}/run --output {here}/mean.safetensors => {here}/gone
report {here}/nothing => {here}/nothing
""",
}
CASES = [
    (script, *line.split(" => "))
    for script, lines in {"train": TRAIN, "eval": EVAL, "predict": PREDICT, **OTHERS}.items()
    for line in lines.strip().splitlines()
]


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording, manifests that are good and bad, a folder of texts, a run with an own and a published checkpoint."""
    folder = tmp_path_factory.mktemp("things")
    soundfile.write(folder / "a.wav", 0.1 * np.sin(np.arange(16_000)), 16_000)
    row = {"audio_filepath": str(folder / "a.wav"), "text": "one", "duration": 1.0}
    undecodable = {**row, "audio_filepath": str(folder / "texts/a.pth")}
    (folder / "texts").mkdir()
    (folder / "texts/a.pth").write_text("no tensors")
    (folder / "nothing").mkdir()
    for name, lines in {
        "good": [json.dumps({**row, "id": str(i)}) for i in range(4)],
        "empty": [],
        "broken": ["{", json.dumps(row), "[1]", '"x"', "null"],
        "no_text": [json.dumps({"audio_filepath": "a.wav"})] * 9,
        "no_file": [json.dumps({**row, "audio_filepath": "gone.wav"})] * 9,
        "undecodable": [json.dumps({**undecodable, "id": str(i)}) for i in range(4)],
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    SpeechLM.build(Parts("tiny")).save(folder / "run/last.safetensors")
    export_published(load_trained(folder / "run/last.safetensors"), folder / "run/published.pth")
    return folder


def arguments(script: str, words: str, things: Path, tmp_path: Path) -> list[str]:
    given = [word.format(here=things, long=LONG_NUMBER) for word in words.split(" ")]
    if script in OTHERS:
        return given
    flags = {
        "train": {"proj_dir": tmp_path / "run", "train_data": things / "good.jsonl", "workers": 0},
        "eval": {"proj_dir": things / "run", "eval_data": things / "good.jsonl"},
        "predict": {"proj_dir": things / "run"},
    }[script]
    flags |= {"load_model": "" if script != "train" else "tiny", "device": "cpu", "micro_bsz": 2}
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))] + given


def assert_a_clear_error(code: object, err: str, expected: str) -> None:
    lines = [line for line in err.splitlines() if "Warning" not in line and not line.startswith("  warnings.warn")]
    assert code == 2, err
    assert lines and lines[0].startswith("error: ") and len(lines) <= 3, err
    assert expected in err and "Traceback" not in err


@pytest.mark.parametrize(("script", "words", "expected"), CASES, ids=lambda x: x if len(x) < 60 else x[:60])
def test_a_mistake_is_answered_in_three_lines(
    script: str, words: str, expected: str, things: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    code = importlib.import_module(script).main(arguments(script, words, things, tmp_path))
    shown = capsys.readouterr()
    assert_a_clear_error(code, shown.err, expected.format(here=things))
    assert "trained weights are in" not in shown.out and "WER" not in shown.out


def test_there_are_many_mistakes_and_each_flag_of_training_that_takes_numbers_or_choices_is_among_them():
    assert len(CASES) >= 60
    names = [f.name for f in dataclasses.fields(TrainConfig) if f.metadata["choices"] or f.type is not str]
    untried = [name for name in names if not any(f"--{name} " in words + " " for _, words, _ in CASES)]
    assert set(untried) <= {"n_embd", "encoder_precision", "compile"}  # as n_layer, precision, grad_cp


@pytest.mark.parametrize("word", [b"--file_path=\xff.wav", b"--proj_dir=\xc3\x28"])
def test_bytes_that_are_no_text(word: bytes):
    command = [sys.executable.encode(), b"predict.py", word]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert_a_clear_error(done.returncode, done.stderr.decode(), "found bytes that are no text")
    assert done.stdout == b""


@pytest.mark.parametrize(
    ("most", "named"), [(20_000, "run/last.safetensors: File too large"), (2_500_000, "--proj_dir: ")]
)
def test_a_full_disk_is_named(most: int, named: str, things: Path, tmp_path: Path):
    """With files of at most so many bytes, which the system refuses as it does on a full disk."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    command = [sys.executable, str(ROOT / "train.py"), *arguments("train", "--epoch_count 1", things, tmp_path)]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert_a_clear_error(done.returncode, done.stderr, named)
    assert "trained weights are in" not in done.stdout
