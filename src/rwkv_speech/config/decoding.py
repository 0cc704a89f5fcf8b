"""Flags of how text is made of audio, and of eval.py."""

import re
from dataclasses import dataclass
from typing import ClassVar

from rwkv_speech.config.forms import (
    CHECKPOINT_HELP,
    HISTORIES,
    LIBRISPEECH_TESTS,
    NORMALIZERS,
    OFF_ON,
    PHRASES,
    STATE_HELP,
    TASK_FORM,
    TEMPERATURES,
    TEXT,
    VADS,
)
from rwkv_speech.config.model import ColumnFlags, ModelConfig
from rwkv_speech.errors import UserError
from rwkv_speech.flags import Flags, flag


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
        "weight of the CTC head's log-probability: in each step of a search of --beam, among the samples of --best_of",
        at_least=0,
        at_most=10,
    )
    temperature: str = flag(
        "0,0.2,0.4,0.6,0.8,1.0",
        "temperatures, each of which is tried where the text of the one before fails a threshold; 0: greedy or beam",
        form=TEMPERATURES,
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
        "", "file of phrases to expect, one a line, its own weight behind a tab", form=PHRASES
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
        "0", "as in predict.py, whose fallback temperatures an evaluation leaves out", form=TEMPERATURES
    )
    vad: str = flag("none", "as in predict.py; an evaluation takes utterances as they are", VADS)
    history: str = flag(
        "own", "what a conversation's later turns follow: the model's own answers, or those given with it", HISTORIES
    )


@dataclass(frozen=True)
class EvalConfig(ColumnFlags, _EvalDecodeFlags, ModelConfig):
    """eval.py"""

    group: ClassVar[str] = "run"
    results: tuple[str, ...] = flag((), "with --compare the second of the two results")
    compare: str = flag(
        "",
        "--compare A B: compare two results instead, each a file such as eval-best-test-1c9a04.jsonl or a run's folder",
    )
    checkpoint: str = flag("", CHECKPOINT_HELP)
    eval_data: str = flag(LIBRISPEECH_TESTS, "what to score, each set by itself, separated by commas")
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
