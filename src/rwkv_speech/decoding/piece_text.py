"""From a decoded piece to its text and its segment: what is kept of it, with the CTC head as a witness."""

import itertools
from collections.abc import Iterable

from torch import Tensor

from rwkv_speech import tasks
from rwkv_speech.audio import SAMPLE_RATE
from rwkv_speech.batch import Sample
from rwkv_speech.decoding import coverage, guards
from rwkv_speech.decoding.confidence import judge
from rwkv_speech.decoding.engine import Done
from rwkv_speech.decoding.long_audio import Piece
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.reader import Reader
from rwkv_speech.decoding.results import Segment
from rwkv_speech.decoding.timestamps import WordTimes
from rwkv_speech.models.speech_lm import SpeechLM


class PieceText:
    """Judges what an engine found in pieces, by one model."""

    def __init__(self, model: SpeechLM) -> None:
        self._model, self._reader = model, Reader(model)
        self._times = None if model.ctc is None else WordTimes(model.ctc, model.encoder)

    def text(self, done: Done, options: Options) -> str:
        """The text of a piece, none of silence, and none that is made up."""
        text, head = self._model.tokenizer.decode(done.hypotheses[0].ids), self._model.ctc
        if head is None or done.ctc is None or not self._says_what_is_heard(done):
            return text
        is_silence = guards.is_silence(self._silence(done), options)
        return "" if is_silence or guards.is_unheard(text, done.ctc, head.spec, options) else text

    def segment(self, done: Done, text: str, piece: Piece, options: Options) -> Segment:
        """The segment of a piece with this text."""
        best = done.hypotheses[0]
        start, end = piece.start / SAMPLE_RATE, piece.end / SAMPLE_RATE
        words = None
        if options.word_timestamps and self._times and done.ctc is not None:
            words = self._times.words(text, done.ctc, start, end, judge(self._model, best, done.ctc))
        return Segment(
            id=0,
            start=start,
            end=end,
            text=text,
            tokens=list(best.ids),
            temperature=done.request.temperature,
            avg_logprob=best.avg_logprob,
            compression_ratio=guards.compression_ratio(text),
            no_speech_prob=self._silence(done),
            cut=best.cut,
            words=words,
            logprobs=best.logprobs,
        )

    def needs_fallback(self, done: Done, options: Options) -> bool:
        """Whether a piece is to be decoded again, at a higher temperature."""
        silence = self._silence(done)
        if guards.is_silence(silence, options):
            return False
        best = done.hypotheses[0]
        if best.heard is not None and not best.ids:  # it has not come to its answer
            return True
        return guards.needs_fallback(best, self.text(done, options), silence, options)

    def halves(self, done: Done, piece: Piece, options: Options) -> tuple[Piece, Piece] | None:
        """A piece in two if its text is far from what the CTC head hears; but what is to be taken as it is, is."""
        head = self._model.ctc
        if head is None or done.ctc is None or not self._says_what_is_heard(done) or options.vad == "none":
            return None
        step = self._model.encoder.framing.samples_per_frame
        return coverage.halves(piece, done.ctc, head.spec.labels, self.text(done, options), step)

    def num_errors(self, found: Iterable[Done], options: Options) -> int:
        """How far, in letters, the texts of some pieces are from what the CTC head hears in them."""
        head = self._model.ctc
        assert head is not None
        heard = [(x.ctc, head.spec.labels, self.text(x, options)) for x in found if x.ctc is not None]
        return sum(itertools.starmap(coverage.num_errors, heard))

    def word_gaps(self, waveform: Tensor) -> list[int]:
        """Samples between two words of (S,), as far as the CTC head hears them."""
        head, sample = self._model.ctc, Sample("", waveform, "", [], len(waveform) / SAMPLE_RATE, 0, "")
        if head is None:
            return []
        [encoded] = self._reader.encode([sample])
        step = self._model.encoder.framing.samples_per_frame
        return [] if encoded.ctc is None else coverage.word_gaps(encoded.ctc, head.spec.labels, step)

    def _says_what_is_heard(self, done: Done) -> bool:
        """Whether a piece's text is to be what the CTC head hears, not a translation, an answer or a sound's name."""
        return done.ctc is not None and tasks.base_of(done.request.sample.task) == tasks.DEFAULT

    def _silence(self, done: Done) -> float:
        is_known = self._says_what_is_heard(done)
        return guards.no_speech_prob(done.ctc, self._model.encoder.framing.frame_rate) if is_known else 0.0
