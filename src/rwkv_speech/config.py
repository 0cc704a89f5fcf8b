"""Every flag of train.py, eval.py and predict.py: what it is for and what it may be."""

import re
from dataclasses import dataclass
from typing import ClassVar

from rwkv_speech.errors import UserError
from rwkv_speech.flags import Flags, flag

STRATEGIES = ("auto", "ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
YES_NO = ("yes", "no")
OFF_ON = (0, 1)
PRECISIONS = ("auto", "bf16", "fp32", "int8")
ENCODER_PRECISIONS = ("auto", "bf16", "fp32")
KERNEL_FORMS = ("auto", "torch", "steps", "tiles")
AUDIO, TEXT = INPUTS = ("audio", "text")
LABEL_MODES = ("none", "lower")
NORMALIZERS = ("casefold", "characters", "basic", "whisper-english", "none")
PROMPT_FORMS = ("user", "instruction", "continue")
SCHEDULES = ("cosine", "constant")
FREEZE_ADAPTER = "adapter"
FROZEN = ("none", FREEZE_ADAPTER)
LOSSES = ("ce", "kl")
STATE_BY = ("task", "lang")
COMMITS = ("segment", "word")
VADS = ("silero", "none")
HISTORIES = ("own", "given")
OUTPUT_FORMATS = ("txt", "srt", "vtt", "tsv", "json")
FEATURE_DTYPES = ("bfloat16", "float16", "float32")
# What --train_data, --valid_data and --eval_data accept.
DATA_FORMS = {
    "FILE.jsonl or FILE.json": "a manifest: JSON lines with audio_filepath and text",
    "FILE.parquet or FILE.arrow": "a manifest with such columns",
    "FOLDER": "audio files, each with a .txt of the same name beside it",
    "FOLDER or FOLDER:SPLIT": "what datasets' save_to_disk wrote",
    "hf:NAME:SPLIT": "a Hugging Face dataset; SPLIT may be a+b",
    "hf:NAME:CONFIG:SPLIT": "one configuration of it",
    "librispeech:SPLIT": "LibriSpeech, for example train-960 or test-clean",
    "commonvoice:FOLDER:SPLIT": "a language of Common Voice, downloaded: SPLIT.tsv and clips",
    "fleurs:LANG:SPLIT": "FLEURS, for example fleurs:de_de:train, or its folder as LANG",
    "mls:LANG:SPLIT": "Multilingual LibriSpeech, for example mls:german:dev, or its folder",
    "aishell:FOLDER:SPLIT": "AISHELL-1, downloaded and unpacked",
    "covost:SRC_TGT:SPLIT": "CoVoST 2, as covost:en_de:test; or covost:FOLDER:SRC_TGT:SPLIT",
    "tar:FOLDER or tar:PATTERN": "WebDataset shards, for example tar:/data/train-{000..099}.tar",
    "hf-stream:NAME:SPLIT": "read as it arrives: the whole of --train_data, with --epoch_steps",
}
ACCEPTED_FORMS = ", ".join(DATA_FORMS)
TASK_FORM = (re.compile("[a-z][a-z0-9_]*").fullmatch, "a name of lower-case letters, digits and _, such as asr")
STATE_HELP = "file of states to use beside those of the weights; if it holds one and --task is empty, that is for all"
_LIBRISPEECH_TESTS = "librispeech:test-clean,librispeech:test-other"


def numbers(text: str) -> tuple[float, ...]:
    """The comma-separated numbers of a flag; raises ValueError for anything else."""
    return tuple(float(part) for part in text.split(",")) if text.strip() else ()


def _are_factors(text: str) -> bool:
    # Whole percents keep the filter that changes the speed small.
    return all(0.5 <= x <= 2.0 and abs(100 * x - round(100 * x)) < 1e-6 for x in numbers(text))


def _are_temperatures(text: str) -> bool:
    found = numbers(text)
    return bool(found) and all(0 <= x <= 2 for x in found) and list(found) == sorted(set(found))


def _are_limits(text: str) -> bool:
    found = numbers(text)
    return len(found) == 2 and -100 <= found[0] <= found[1] <= 100


_PHRASES = (
    lambda found: isinstance(found, str) or all(isinstance(line, str) for line in found),
    "a file, or in Python a list of phrases",
)


def output_formats(text: str) -> tuple[str, ...]:
    """The comma-separated formats of a flag, `all` being each of them; raises ValueError for anything else."""
    named = [part.strip() for part in text.split(",")] if text else []
    if not set(named) <= {*OUTPUT_FORMATS, "all"}:
        raise ValueError(text)
    return OUTPUT_FORMATS if "all" in named else tuple(dict.fromkeys(named))


def _are_tasks(text: str) -> bool:
    return all(TASK_FORM[0](name) for name in text.split(","))


_STATES = (_are_tasks, "names of lower-case letters, digits and _, separated by commas")
_FORMATS = (output_formats, f"one or several of {', '.join(OUTPUT_FORMATS)} and all, separated by commas")
_TEMPERATURES = (_are_temperatures, "rising numbers from 0 to 2, as in 0 or 0,0.5,1")
_PROMPT_FORM = (
    lambda text: text in PROMPT_FORMS or "{text}" in text,
    f"one of {', '.join(PROMPT_FORMS)}, or a template that holds {{text}}",
)
_LIMITS = (_are_limits, "two numbers of dB, lowest and highest, from -100 to 100, as in -10,6")


@dataclass(frozen=True)
class _ModelFlags:
    group: ClassVar[str] = "model"
    load_model: str = flag(
        "", "base model, a .pth or .safetensors file; empty: the checkpoint's, else the embedded 'tiny'"
    )
    encoder: str = flag("", "speech encoder, a hub id or a folder; empty: microsoft/wavlm-large, or the tiny one")
    encoder_padding: float | None = flag(
        None,
        "seconds that a Whisper encoder hears at least, the rest being silence; it was trained on 30; empty: the audio "
        "and half a second",
        at_least=0,
        at_most=30,
    )
    vocab_file: str = flag("", "vocabulary in the World format; empty: the World vocabulary, or the tiny one")
    n_layer: int | None = flag(
        None, "layers of the base model; empty: read from the file, else it must agree", at_least=1, resume=True
    )
    n_embd: int | None = flag(
        None, "channels of the base model; empty: read from the file, else it must agree", at_least=1, resume=True
    )
    stack: int | None = flag(
        None, "encoder frames per audio token; empty: 5, or 3 for the tiny model", at_least=1, at_most=1000
    )
    adapter_hidden: int | None = flag(None, "hidden width of the adapter; empty: 2048, or 512 for tiny", at_least=1)
    separator: str = flag("#", "the one token between audio and text")


@dataclass(frozen=True)
class _DeviceFlags:
    group: ClassVar[str] = "device and precision"
    device: str = flag(
        "auto",
        "auto, cpu, cpu:N (processes), cuda, or the number of GPUs",
        form=(
            re.compile("auto|cuda|cpu(:[1-9][0-9]{0,3})?|[1-9][0-9]{0,3}").fullmatch,
            "auto, cpu, cpu:N (processes), cuda or a number of GPUs",
        ),
        resume=True,
    )
    precision: str = flag(
        "auto",
        "the language model's; auto: bf16 on a GPU, fp32 on a CPU; int8, its matrices in 8 bits, is for decoding on a "
        "CPU alone",
        PRECISIONS,
    )
    encoder_precision: str = flag(
        "auto", "the speech encoder's; auto: as --precision, fp32 beside int8", ENCODER_PRECISIONS
    )
    wkv6: str = flag(
        "auto",
        "kernel of WKV-6: auto, the native one; torch, PyTorch's operations; on a GPU also "
        "steps (first generation, what auto takes) and tiles (second, tensor cores)",
        KERNEL_FORMS,
        resume=True,
    )


@dataclass(frozen=True)
class ModelConfig(_ModelFlags, _DeviceFlags, Flags):
    """What training, evaluation and prediction need to know."""

    group: ClassVar[str] = "run"
    proj_dir: str = flag("output", "folder of the run: checkpoints, logs, results", resume=True)
    micro_bsz: int = flag(4, "utterances per device and step", at_least=1, resume=True)


@dataclass(frozen=True)
class _ColumnFlags:
    group: ClassVar[str] = "data"
    epilog: ClassVar[str] = "forms of data:\n" + "\n".join(f"  {x:<27}  {text}" for x, text in DATA_FORMS.items())
    input: str = flag(
        "audio",
        "text: source_text, in recognition the text, is read in place of audio, by a state alone; the adapter is not "
        "trained",
        INPUTS,
    )
    audio_column: str = flag("audio", "column of the audio in a Hugging Face dataset")
    text_column: str = flag("text", "column of the text in a Hugging Face dataset")


@dataclass(frozen=True)
class _TrainDataFlags(_ColumnFlags):
    group: ClassVar[str] = "data"
    train_data: str = flag(
        "",
        "what to train on, several separated by commas, each with @WEIGHT if it is to come so many times an epoch",
    )
    valid_data: str = flag("", "what to score during training, in the same forms; empty: nothing")
    label_mode: str = flag("none", "what is done to transcripts before they are learned", LABEL_MODES)
    task: str = flag(
        "asr",
        "task of utterances that name none; each task is the name of an initial state that is learned",
        form=TASK_FORM,
    )
    state_by: str = flag(
        "task",
        "task: a state for each task of the training data, of translation for each language of the text; lang: for "
        "each language of recognition, too",
        STATE_BY,
    )
    states: str = flag(
        "", "further states, separated by commas: for a stream, whose tasks are not known beforehand", form=_STATES
    )
    ctx_len: int = flag(1024, "most positions of audio and text; longer utterances are left out and listed", at_least=1)
    batch_seconds: float | None = flag(
        None,
        "seconds of audio per device and micro batch, padding included, instead of --micro_bsz",
        above=0,
        resume=True,
    )
    max_bad: int = flag(20, "how many broken recordings may be skipped before the run stops", at_least=0, resume=True)
    workers: int = flag(2, "processes that decode audio", at_least=0, at_most=1024, resume=True)
    feature_cache: str = flag("", "folder that keeps the frozen encoder's frames, made once; empty: none", resume=True)
    feature_dtype: str = flag(
        "bfloat16", "type in which frames are kept", FEATURE_DTYPES, resume=True, needs="feature_cache"
    )


@dataclass(frozen=True)
class _AudioFlags:
    group: ClassVar[str] = "changes of the training audio"
    speed: str = flag(
        "",
        "factors of speed, one of which is drawn for each utterance and epoch, as in 0.9,1,1.1",
        form=(_are_factors, "factors from 0.5 to 2 with two decimals at most, as in 0.9,1,1.1"),
    )
    volume_db: str = flag("", "lowest and highest gain in dB, as in -10,6", form=_LIMITS)
    noise_dir: str = flag("", "folder of audio files that are added as noise")
    noise_snr_db: str = flag("5,30", "lowest and highest signal-to-noise ratio in dB", form=_LIMITS, needs="noise_dir")
    time_masks: int = flag(0, "spans of each utterance that are silenced", at_least=0, at_most=100)
    time_mask_seconds: float = flag(0.2, "longest such span", above=0, below=60, needs="time_masks")
    freq_masks: int = flag(0, "bands of each utterance that are taken out", at_least=0, at_most=100)
    freq_mask_hz: float = flag(500.0, "widest such band", above=0, at_most=8000, needs="freq_masks")


@dataclass(frozen=True)
class _OptimizerFlags:
    group: ClassVar[str] = "training"
    init_from: str = flag("", "start from this checkpoint, own or published, instead of new weights")
    soft_prompt: int = flag(
        0,
        "learned vectors that each new task reads between audio and separator, beside its state",
        at_least=0,
        at_most=1000,
    )
    freeze: str = flag(
        "none",
        "adapter: it stays as in --init_from, whose states are kept, and the states of the training data alone are "
        "learned",
        FROZEN,
        needs="init_from",
    )
    epoch_count: int = flag(1, "epochs", at_least=1, resume=True)
    epoch_steps: int | None = flag(None, "steps per epoch; empty: all of the data", at_least=1)
    accumulate: int = flag(1, "micro batches per optimizer step", at_least=1, resume=True)
    lr_adapter: float = flag(1e-4, "learning rate of the adapter", at_least=0)
    lr_state: float = flag(
        1e-2, "learning rate of the initial states; states alone, with --freeze adapter, want about 1", at_least=0
    )
    lr_schedule: str = flag("cosine", "course of both learning rates after the warm-up", SCHEDULES)
    warmup_steps: int = flag(100, "optimizer steps of linear warm-up", at_least=0)
    weight_decay: float = flag(0.01, "weight decay of the adapter", at_least=0)
    beta1: float = flag(0.9, "AdamW's decay of the gradient's average", at_least=0, below=1)
    beta2: float = flag(0.99, "AdamW's decay of the squared gradient's average", at_least=0, below=1)
    adam_eps: float = flag(1e-8, "what AdamW adds to the root of that average", above=0)
    loss: str = flag(
        "ce",
        "ce: cross-entropy; kl: for lines with an answer and a source_text the divergence from what the same frozen "
        "language model says to the transcript",
        LOSSES,
    )
    kl_temperature: float = flag(2.0, "what softens both distributions of --loss kl", at_least=0.1, at_most=100)
    kl_form: str = flag(
        "user",
        "how that model is asked: user, instruction, continue (the text alone, to be continued), or a template with "
        "{text}",
        form=_PROMPT_FORM,
    )
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0: no limit", at_least=0)
    seed: int = flag(1, "seed of initial values and of the order of the data", at_least=0, at_most=2**32 - 1)
    ctc: int = flag(
        0,
        "1: train a CTC head, too, after all else or on a finished run: for word times, drafts, and to tell noise",
        OFF_ON,
        resume=True,
    )
    ctc_epochs: int | None = flag(
        None,
        "epochs of the CTC head; empty: those that make 750 steps, 20 at most",
        at_least=1,
        needs="ctc",
        resume=True,
    )
    lr_ctc: float = flag(4e-3, "learning rate of the CTC head", above=0, needs="ctc", resume=True)


@dataclass(frozen=True)
class _TrainDeviceFlags(_DeviceFlags):
    group: ClassVar[str] = "device and precision"
    strategy: str = flag("auto", "how several GPUs work together", STRATEGIES, resume=True)
    num_nodes: int = flag(1, "machines", at_least=1, resume=True)
    grad_cp: int = flag(0, "1: compute the language model's layers again in the backward pass, for less memory", OFF_ON)
    compile: int = flag(
        0,
        "1: fuse the language model's elementwise parts with torch.compile; needs a C++ compiler, on a GPU Triton, "
        "and up to a minute at the start",
        OFF_ON,
        resume=True,
    )


@dataclass(frozen=True)
class TrainConfig(_OptimizerFlags, _AudioFlags, _TrainDataFlags, _TrainDeviceFlags, ModelConfig):
    """train.py"""

    group: ClassVar[str] = "run"
    epoch_save: int = flag(
        1, "keep a checkpoint of every this many epochs, beside the best and the last", at_least=1, resume=True
    )
    keep_best: int = flag(
        0, "keep the checkpoints of this many epochs of lowest error, too", at_least=0, resume=True, needs="valid_data"
    )
    patience: int = flag(
        0,
        "stop after this many validations without a lower error; 0: never",
        at_least=0,
        resume=True,
        needs="valid_data",
    )
    min_delta: float = flag(
        0.0, "by how much an error must be lower to count", at_least=0, resume=True, needs="patience"
    )
    resume: str = flag(
        "yes",
        "yes: resume the run in --proj_dir where it stopped; no: start from the beginning, in a new folder if there "
        "is one",
        YES_NO,
        resume=True,
    )
    save_steps: int = flag(
        500, "optimizer steps between two points to resume from, beside one after every epoch", at_least=1, resume=True
    )
    wandb: str = flag("", "project of Weights & Biases to log to; empty: none", resume=True)
    plan: int = flag(0, "1: print what the run will need, its memory, steps and time, and end", OFF_ON, resume=True)
    plan_hours: float | None = flag(
        None, "hours of audio in an epoch, for a plan without data", above=0, at_most=1e6, needs="plan", resume=True
    )
    score_first: int = flag(
        0, "1: score the validation data before training, too", OFF_ON, resume=True, needs="valid_data"
    )
    log_every: int = flag(10, "steps between two lines of the log", at_least=1, resume=True)

    @property
    def adapter_stays(self) -> bool:
        """Whether the adapter, and with it the states of other tasks, stay as they are in --init_from."""
        return self.freeze == FREEZE_ADAPTER or self.input == TEXT

    def check(self) -> None:
        """Raises UserError for 8 bits, and for what ranks would do each in its own time with the layers shared out."""
        if self.precision == "int8":
            raise UserError(
                "--precision: found 'int8', which is for decoding alone, expected auto, bf16 or fp32; train in one of "
                "these, and give int8 to eval.py or predict.py"
            )
        for name in ("valid_data", "feature_cache"):
            if self.strategy == "deepspeed_stage_3" and getattr(self, name):
                raise UserError(
                    f"--{name}: found {getattr(self, name)!r} with --strategy deepspeed_stage_3, expected nothing: it "
                    "shares out the frozen layers, and ranks would wait for each other for ever; leave it empty and "
                    "score with eval.py afterwards, or use deepspeed_stage_2"
                )
        for name, default in (("kl_temperature", 2.0), ("kl_form", "user")):
            if self.loss != "kl" and getattr(self, name) != default:
                raise UserError(f"--{name}: found without --loss kl, where it has no effect; add it, or leave this out")
        if self.loss == "kl" and self.strategy == "deepspeed_stage_3":
            raise UserError(
                "--loss: found kl with --strategy deepspeed_stage_3, which shares out the frozen layers: ranks without "
                "an answer in a batch would keep the others waiting; use deepspeed_stage_2"
            )
        if self.ctc and self.strategy == "deepspeed_stage_3":
            raise UserError(
                "--ctc: found 1 with --strategy deepspeed_stage_3, which shares out the frozen encoder; train without "
                "it, then start the finished run again with --ctc 1 --strategy ddp"
            )
        for name in ("plan", "ctc", "feature_cache", "speed", "volume_db", "noise_dir", "time_masks", "freq_masks"):
            if self.input == TEXT and getattr(self, name):
                raise UserError(
                    f"--{name}: found {getattr(self, name)!r} with --input text, which hears nothing; leave out one of "
                    "them"
                )
        if self.ctc and self.train_data.startswith("hf-stream:"):
            raise UserError(
                f"--ctc: {self.train_data} arrives row by row, expected data whose characters can be listed: a "
                "manifest, a folder, tar shards or a set on the disk"
            )


@dataclass(frozen=True)
class DecodeFlags(Flags):
    """How text is made of audio; names and defaults are those of whisper where it has them."""

    group: ClassVar[str] = "decoding"
    beam: int = flag(1, "hypotheses that a beam search keeps; 1: greedy", at_least=1, at_most=64)
    best_of: int = flag(5, "samples of which the likeliest is taken, above temperature 0", at_least=1, at_most=64)
    patience: float = flag(1.0, "a beam search ends with beam x patience whole hypotheses", above=0, at_most=100)
    length_penalty: float | None = flag(
        None, "alpha of ((5 + length) / 6)^alpha; empty: by length", at_least=0, at_most=1
    )
    ctc_weight: float = flag(
        0.0,
        "weight of the CTC head's log-probability in choosing among the texts of --beam or --best_of",
        at_least=0,
        at_most=10,
    )
    temperature: str = flag(
        "0,0.2,0.4,0.6,0.8,1.0",
        "temperatures, each of which is tried where the text of the one before fails a threshold; 0: greedy or beam",
        form=_TEMPERATURES,
    )
    compression_ratio_threshold: float = flag(2.4, "a text that compresses better failed: it repeats itself", above=0)
    logprob_threshold: float = flag(-1.0, "a text of lower mean log-probability failed", at_least=-1000, at_most=0)
    no_speech_threshold: float = flag(
        0.6, "what is likelier no speech, and failed, gives no text", at_least=0, at_most=1
    )
    top_k: int = flag(0, "tokens that are sampled from; 0: all", at_least=0)
    top_p: float = flag(1.0, "probability of the likeliest tokens, which are sampled from", above=0, at_most=1)
    presence_penalty: float = flag(0.0, "taken from the logit of a token that has come", at_least=-2, at_most=2)
    frequency_penalty: float = flag(0.0, "the same for each time that it has come", at_least=-2, at_most=2)
    repetition_penalty: float = flag(1.0, "what such a logit is divided by; 1: nothing", above=0, at_most=10)
    no_repeat_ngram_size: int = flag(0, "n-grams of tokens of this length come once; 0: no limit", at_least=0)
    initial_prompt: str = flag("", "text before the audio")
    prompt: str = flag("", "text between audio and separator")
    keywords: str | tuple[str, ...] = flag(
        "", "file of phrases to expect, one a line, its own weight behind a tab", form=_PHRASES
    )
    keyword_weight: float = flag(
        2.0, "by which each token of such a phrase is likelier, a log-probability", above=0, at_most=20
    )
    language: str = flag(
        "",
        "language that is spoken where a manifest does not say, as fr: recognition takes its state, if there is one; "
        "auto: what the state lid finds in each recording",
        form=(re.compile("auto|[A-Za-z]{2,3}([-_][A-Za-z0-9]+)*").fullmatch, "auto or the code of a language, as fr"),
    )
    condition_on_previous_text: int = flag(0, "1: the text so far stands before the audio of the next piece", OFF_ON)
    draft: int = flag(0, "1: verify the text of the CTC head instead of making each token; the same text", OFF_ON)
    word_timestamps: int = flag(0, "1: start, end and probability of each word, by the CTC head", OFF_ON)
    vad: str = flag("silero", "what finds speech, the rest being left out; none: all is speech", VADS)
    max_segment: float | None = flag(
        None, "seconds of audio that are read at once; empty: the longest of training", at_least=1, at_most=3600
    )
    max_new_tokens: int | None = flag(None, "longest text of a piece in tokens; empty: by its length", at_least=1)
    sampling_seed: int = flag(0, "seed of what is sampled", at_least=0, at_most=2**32 - 1)


@dataclass(frozen=True)
class _EvalDecodeFlags(DecodeFlags):
    group: ClassVar[str] = "decoding"
    temperature: str = flag(
        "0", "as in predict.py, whose fallback temperatures an evaluation leaves out", form=_TEMPERATURES
    )
    vad: str = flag("none", "as in predict.py; an evaluation takes utterances as they are", VADS)
    history: str = flag(
        "own", "what a conversation's later turns follow: the model's own answers, or those given with it", HISTORIES
    )


@dataclass(frozen=True)
class EvalConfig(_ColumnFlags, _EvalDecodeFlags, ModelConfig):
    """eval.py"""

    group: ClassVar[str] = "run"
    results: tuple[str, ...] = flag((), "with --compare the second of the two results")
    compare: str = flag(
        "",
        "--compare A B: compare two results instead, each a file such as eval-best-test-1c9a04.jsonl or a run's folder",
    )
    checkpoint: str = flag("", "trained weights, own or published; empty: the best of --proj_dir")
    eval_data: str = flag(_LIBRISPEECH_TESTS, "what to score, each set by itself, separated by commas")
    task: str = flag("", "state for all utterances, whatever task they name; empty: each its own", form=TASK_FORM)
    state: str = flag("", STATE_HELP)
    cascade: str = flag(
        "",
        "a run that was trained with --input text: beside each translation or answer stands that of this run, which "
        "reads what the state asr recognises, and what is really said (source_text)",
    )
    untrained: int = flag(0, "1: score new, untrained weights instead, for comparison", OFF_ON)
    max_bad: int = flag(0, "how many broken recordings may be skipped before the run stops", at_least=0)
    normalizer: str = flag(
        NORMALIZERS[0],
        "form in which texts are compared: casefold, no case and punctuation; characters, Han, Kana, Thai and others "
        "without blanks split besides; basic and whisper-english, whisper's; none, as they are",
        NORMALIZERS,
    )
    seed: int = flag(1, "seed of the bootstrap, and of untrained weights", at_least=0, at_most=2**32 - 1)

    def check(self) -> None:
        """Raises UserError for flags that contradict each other."""
        if self.compare and len(self.results) != 1:
            found = " ".join([self.compare, *self.results])
            raise UserError(f"--compare: found {found!r}, expected two results: --compare A B")
        if self.results and not self.compare:
            raise UserError(
                f"{self.results[0]!r}: found a word that belongs to no flag, expected --FLAG VALUE pairs; quote values "
                "with blanks"
            )
        if self.cascade and self.input == TEXT:
            raise UserError("--cascade: has no effect with --input text; leave one of them out")
        if self.untrained and self.checkpoint:
            raise UserError("--checkpoint: has no effect with --untrained 1; leave one of them out")


@dataclass(frozen=True)
class _OutputFlags:
    group: ClassVar[str] = "output"
    output_format: str = flag(
        "", "files to write beside the text on the screen: txt, srt, vtt, tsv, json, several or all", form=_FORMATS
    )
    output_dir: str = flag(".", "folder that they are written to", needs="output_format")
    skip_existing: int = flag(0, "1: leave out recordings whose files are all there", OFF_ON, needs="output_format")
    verbose: int = flag(0, "1: a line for each segment, with its times, on the screen", OFF_ON)
    max_line_width: int | None = flag(
        None, "most characters of a line of subtitles", at_least=1, needs="word_timestamps"
    )
    max_line_count: int | None = flag(None, "most lines of a subtitle", at_least=1, needs="max_line_width")
    max_words_per_line: int | None = flag(None, "most words of a subtitle", at_least=1, needs="word_timestamps")


@dataclass(frozen=True)
class _StreamFlags:
    group: ClassVar[str] = "streaming"
    stream: str = flag(
        "",
        "-: in place of files, raw 16-bit samples (little-endian, mono) from standard input, as they come",
        form=(lambda text: text == "-", "-, which is standard input"),
    )
    stream_rate: int = flag(16_000, "its samples a second", at_least=1000, at_most=1_000_000, needs="stream")
    commit: str = flag(
        "segment",
        "segment: text that stays comes in each pause, and is that of a file; word: soon after each word",
        COMMITS,
        needs="stream",
    )
    pace: float | None = flag(
        None,
        "seconds from one reading of what is being said to the next; empty: 0.25 for words, 0.5 on a terminal, else "
        "none",
        above=0,
        at_most=60,
        needs="stream",
    )


_NOT_IN_SESSIONS = (
    "stream", "output_format", "word_timestamps", "draft", "verbose", "language", "max_segment",
    "condition_on_previous_text",
)  # fmt: skip


@dataclass(frozen=True)
class _SessionFlags:
    group: ClassVar[str] = "conversation"
    session: str = flag(
        "",
        "file of a conversation, made if it is missing: the audio files are its next turns, one after another, "
        "each heard whole",
    )
    text: str = flag("", "turns that are typed, one a line, after those of the audio files", needs="session")


@dataclass(frozen=True)
class PredictConfig(_SessionFlags, _StreamFlags, _OutputFlags, DecodeFlags, ModelConfig):
    """predict.py"""

    group: ClassVar[str] = "run"
    inputs: tuple[str, ...] = flag(
        (),
        "audio files, folders, patterns such as '*.mp3', and manifests (.jsonl). What cannot be read\n"
        "is named and left out; the exit code is then 1.",
    )
    micro_bsz: int = flag(8, "pieces of audio that are decoded together", at_least=1)
    checkpoint: str = flag("", "trained weights, own or published; empty: the best of --proj_dir")
    file_path: str = flag("", "inputs separated by commas")
    task: str = flag(
        "",
        "state to decode with, whatever task a manifest's lines name; empty: theirs, else the only one, or asr",
        form=TASK_FORM,
    )
    state: str = flag("", STATE_HELP)

    def check(self) -> None:
        """Raises UserError for flags that contradict each other, or have no effect on one device."""
        _check_one_device(self)
        if self.stream and (self.inputs or self.file_path or self.output_format):
            raise UserError("--stream: found files or --output_format with it; leave out the one or the other")
        if self.session:
            for name in _NOT_IN_SESSIONS:
                if getattr(self, name):
                    raise UserError(f"--{name}: has no effect with --session; leave one of them out")
        if self.max_words_per_line and self.max_line_width:
            raise UserError("--max_words_per_line: has no effect with --max_line_width; leave one of them out")


@dataclass(frozen=True)
class _AnswerModelFlags:
    group: ClassVar[str] = "model"
    load_model: str = flag("", "base model, a .pth or .safetensors file; empty: the embedded 'tiny'")
    vocab_file: str = flag("", "vocabulary in the World format; empty: the World vocabulary, or the tiny one")
    device: str = flag("auto", "where to compute", ("auto", "cpu", "cuda"))
    precision: str = flag("auto", "auto: bf16 on a GPU, fp32 on a CPU; int8 on a CPU alone", PRECISIONS)


@dataclass(frozen=True)
class AnswerConfig(_AnswerModelFlags, Flags):
    """python -m rwkv_speech make_answers"""

    group: ClassVar[str] = "decoding"
    data: str = flag("", "manifest of JSON lines whose source_text, else text, is answered")
    output: str = flag("", "manifest to write; what it holds already is not answered again")
    form: str = flag(
        "user",
        "how the model is asked: user, instruction, continue (the text alone, to be continued), or a template, as in "
        r"'User: Translate into French: {text}\n\nAssistant:'",
        form=_PROMPT_FORM,
    )
    temperature: float = flag(1.0, "0: the likeliest token each time; above: by chance", at_least=0, at_most=2)
    top_p: float = flag(0.3, "the fewest tokens that hold this much of the probability", above=0, at_most=1)
    max_new_tokens: int = flag(64, "most tokens of an answer", at_least=1)
    seed: int = flag(1, "seed of what is drawn", at_least=0, at_most=2**32 - 1)
    micro_bsz: int = flag(8, "texts that are answered at once", at_least=1)

    def check(self) -> None:
        """Raises UserError without a manifest to read and another to write."""
        for name, what in (("data", "a manifest to read"), ("output", "the name of a manifest to write")):
            if not getattr(self, name):
                raise UserError(f"--{name}: found nothing, expected {what}")


def _check_one_device(config: ModelConfig) -> None:
    if config.device not in ("auto", "cpu", "cuda", "1"):
        raise UserError(
            f"--device: found {config.device!r}, expected auto, cpu or cuda: scores and texts are computed "
            "on one device; leave it out for auto"
        )
