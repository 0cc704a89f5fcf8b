"""What a piece of audio says so far, while it is spoken: one state is kept, texts are decoded from copies of it."""

# F frames · A audio tokens · C channels · K labels of the CTC head · V vocabulary

import re
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_speech.audio import SAMPLE_RATE
from rwkv_speech.batch import Sample
from rwkv_speech.decoding import guards
from rwkv_speech.decoding.draft import Verifier
from rwkv_speech.decoding.keywords import Keywords
from rwkv_speech.decoding.long_audio import Piece
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.reader import Reader
from rwkv_speech.decoding.strategy import Hypothesis, Strategy, Track
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.models.splice import Prompt
from rwkv_speech.text import UNSPACED

# The encoder looks both ways: frames that lie nearer to the end than this still change with what is said next.
SETTLE_SECONDS = 1.0
# What the encoder reads again of the audio before them, so that no reading costs more in a longer piece.
LOOK_BACK_SECONDS = 8.0


class Reading(NamedTuple):
    """A text of the audio so far, its tokens, and the CTC head's log-probabilities (F, K) of all its frames."""

    text: str
    hypothesis: Hypothesis
    ctc: Tensor | None


class Forks:
    """Readings of the piece of a recording that is being spoken, and of one that is complete."""

    def __init__(self, model: SpeechLM, task: str, options: Options) -> None:
        self.keywords = Keywords.of(options, model.tokenizer, model.lm.sizes.vocab, model.lm.emb.weight.device)
        strategy = Strategy(options, model.tokenizer.eos_id)
        self._begin = partial(OpenPiece, model, task, options, strategy, self.keywords)
        self.restart()

    def restart(self) -> None:
        """Forget the open piece."""
        self._open: OpenPiece | None = None
        self._start, self._text = 0, ""

    def read(self, piece: Piece, committed: str = "") -> Reading:
        """The open piece as far as it goes."""
        if self._open is None or piece.start != self._start:
            self._open, self._start, self._text = self._begin(), piece.start, ""
        reading = self._open.read(piece, committed, self._text)
        self._text = reading.text
        return reading

    def read_whole(self, piece: Piece, committed: str) -> Reading:
        """A complete piece, all of whose audio is seen at once; the next reading is of another one."""
        reading = self._begin().read(piece, committed, self._text)
        self.restart()
        return reading


class OpenPiece:
    """Reads a piece of audio again and again while it grows, each time at the same cost.

    Audio tokens are read into the state once, when they lie SETTLE_SECONDS back. The others, the prompt and the
    committed text are read into a copy of it, from which the text goes on, greedily, with the options' penalties and
    keywords; then the copy is dropped.
    """

    @torch.no_grad()
    def __init__(
        self, model: SpeechLM, task: str, options: Options, strategy: Strategy, keywords: Keywords | None = None
    ) -> None:
        self._model, self._options, self._task = model, options, task
        self._strategy, self._keywords = strategy, keywords
        self._reader = Reader(model, rows=1)
        encode = model.tokenizer.encode
        before, _, after = model.prefix(0, task, encode(options.initial_prompt), encode(options.prompt))
        assert isinstance(before, Prompt) and isinstance(after, Prompt)
        self._after = after.ids
        self._state = model.initial_state([task])
        if before.ids:
            _, self._state = model.lm.hidden(self._embed(before.ids)[None], self._state)
        self._stack, self._framing = model.adapter.stack, model.encoder.framing
        self._num_settled = 0  # audio tokens that the state has read
        self._ctc = list[Tensor]()  # of their frames

    @torch.no_grad()
    def read(self, piece: Piece, committed: str = "", draft: str = "") -> Reading:
        """The text of all of the piece that there is, which begins with what is `committed`; a `draft` saves time.

        Nothing follows in what is silence by the CTC head.
        """
        first = max(0, self._num_settled - self._tokens(LOOK_BACK_SECONDS))
        window = piece.waveform[first * self._stack * self._framing.samples_per_frame :]
        [encoded] = self._reader.encode([Sample("", window, "", [], len(window) / SAMPLE_RATE, 0, self._task)])
        known = self._num_settled - first
        audio = encoded.audio[known:].to(self._model.lm.dtype)
        ctc = None if encoded.ctc is None else encoded.ctc[known * self._stack :]
        whole = None if ctc is None else torch.cat([*self._ctc, ctc])
        num_new = max(0, len(audio) - self._tokens(SETTLE_SECONDS))
        if num_new:
            _, self._state = self._model.lm.hidden(audio[None, :num_new], self._state)
            self._num_settled += num_new
            self._ctc += [] if ctc is None else [ctc[: num_new * self._stack]]
        is_silence = guards.is_silence(guards.no_speech_prob(whole, self._framing.frame_rate), self._options)
        if is_silence or not self._num_settled + len(audio):
            return Reading(committed, Hypothesis((), (), (), cut=False), whole)
        limit = self._options.token_limit(len(piece.waveform) / SAMPLE_RATE)
        found = self._decode(audio[num_new:], committed, draft, limit)
        text = self._model.tokenizer.decode(found.ids)
        return Reading(committed + _apart(text[len(committed) :], committed), found, whole)

    def _decode(self, audio: Tensor, committed: str, draft: str, limit: int) -> Hypothesis:
        """The text that follows the state and more audio tokens (A, C)."""
        model, separator = self._model, self._model.separator_of(self._task)
        track = Track(limit, keywords=self._keywords, separator=separator)
        given = model.tokenizer.encode(committed)
        x = torch.cat([audio, self._embed([*self._after, *given])])
        hidden, state = model.lm.hidden(x[None], self._state)
        logits = model.lm.head(hidden[0, -1 - len(given) :])
        for row, token in enumerate(given):
            place, only = torch.tensor([0], device=x.device), torch.tensor([token], device=x.device)
            [choice] = self._strategy.scores(logits[row : row + 1], [track]).of(place, only)
            if text := self._strategy.take(track, choice):
                return text
        # What the reading before said is most of what this one will say.
        verifier = Verifier(model, self._strategy, track, draft, logits[-1:], state)
        while not verifier.ended and verifier.drafts:
            verifier.advance()
        if not verifier.ended:
            verifier.advance()
        logits, state, text = verifier.logits, verifier.state, verifier.ended
        while text is None:
            [choice] = self._strategy.choose(self._strategy.scores(logits, [track]), [None])
            text = self._strategy.take(track, choice)
            logits = model.lm.step(torch.tensor([choice.token], device=x.device), state)
        return text

    def _embed(self, ids: Sequence[int]) -> Tensor:
        return self._model.embed(torch.tensor(ids, device=self._model.lm.emb.weight.device))

    def _tokens(self, seconds: float) -> int:
        return int(seconds * self._framing.frame_rate) // self._stack


def _apart(rest: str, committed: str) -> str:
    """What follows a committed text, without letters that would make another word of its last one."""
    if not committed or not rest or UNSPACED.match(committed[-1]) or UNSPACED.match(rest[0]):
        return rest
    return re.sub(r"^\w+", "", rest)
