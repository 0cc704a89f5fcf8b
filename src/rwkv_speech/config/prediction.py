"""Flags of predict.py and of make_answers."""

from dataclasses import dataclass
from typing import ClassVar

from rwkv_speech.config.decoding import DecodeFlags
from rwkv_speech.config.forms import (
    CHECKPOINT_HELP,
    COMMITS,
    FORMATS,
    OFF_ON,
    PRECISIONS,
    PROMPT_FORM,
    STATE_HELP,
    TASK_FORM,
)
from rwkv_speech.config.model import ModelConfig, check_one_device
from rwkv_speech.errors import UserError
from rwkv_speech.flags import Flags, flag


@dataclass(frozen=True)
class _OutputFlags:
    group: ClassVar[str] = "output"
    output_format: str = flag(
        "", "files to write beside the text on the screen: txt, srt, vtt, tsv, json, several or all", form=FORMATS
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
class _ChatFlags:
    group: ClassVar[str] = "conversation"
    chat: int = flag(0, "1: answer each turn of --stream -, and remember it", OFF_ON, needs="stream")
    turn_silence: float = flag(0.7, "seconds of silence that end a turn", at_least=0.3, at_most=10, needs="chat")
    speak: str = flag(
        "",
        "what speaks the answers: espeak or espeak:VOICE, the embedded synthetic voice (eSpeak NG), or a command that "
        "reads text and writes a WAV file",
        needs="chat",
    )
    play: str = flag("aplay -q", "command that plays the WAV file on its input", needs="speak")


@dataclass(frozen=True)
class PredictConfig(_ChatFlags, _SessionFlags, _StreamFlags, _OutputFlags, DecodeFlags, ModelConfig):
    """predict.py"""

    group: ClassVar[str] = "run"
    inputs: tuple[str, ...] = flag(
        (),
        "audio files, folders, patterns such as '*.mp3', and manifests (.jsonl). What cannot be read\n"
        "is named and left out; the exit code is then 1.",
    )
    micro_bsz: int = flag(8, "pieces of audio that are decoded together", at_least=1)
    checkpoint: str = flag("", CHECKPOINT_HELP)
    file_path: str = flag("", "inputs separated by commas")
    task: str = flag(
        "",
        "state to decode with, whatever task a manifest's lines name; empty: theirs, else the only one, or asr",
        form=TASK_FORM,
    )
    state: str = flag("", STATE_HELP)

    def check(self) -> None:
        """Raises UserError for flags that contradict each other, or have no effect on one device."""
        check_one_device(self)
        if self.stream and (self.inputs or self.file_path or self.output_format):
            raise UserError("--stream: found files or --output_format with it; leave out the one or the other")
        if self.session or self.chat:
            what = "chat" if self.chat else "session"
            for name in _NOT_IN_SESSIONS:
                if getattr(self, name) and not (self.chat and name == "stream"):
                    raise UserError(f"--{name}: has no effect with --{what}; leave one of them out")
        if self.chat and (self.vad == "none" or self.commit != "segment" or self.pace or self.text):
            raise UserError(
                "--chat 1: found --vad none, --commit word, --pace or --text with it; leave them out: a silence ends "
                "each turn, which is answered whole"
            )
        if self.max_words_per_line and self.max_line_width:
            raise UserError("--max_words_per_line: has no effect with --max_line_width; leave one of them out")


@dataclass(frozen=True)
class _AnswerModelFlags:
    group: ClassVar[str] = "model"
    load_model: str = flag("", "base model, a .pth or .safetensors file, or tiny7; empty: the embedded 'tiny'")
    vocab_file: str = flag("", "vocabulary in the World format; empty: the World vocabulary, or the tiny one")
    device: str = flag("auto", "where to compute", ("auto", "cpu", "cuda"))
    precision: str = flag("auto", "auto: bf16 on a GPU, fp32 on a CPU; int8, nf4: fewer bits", PRECISIONS)


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
        form=PROMPT_FORM,
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
