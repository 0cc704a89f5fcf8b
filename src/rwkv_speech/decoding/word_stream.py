"""Words of speech that is still arriving, soon after they are said, and never taken back."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import accumulate, pairwise

from rwkv_speech import tasks
from rwkv_speech.audio import SAMPLE_RATE
from rwkv_speech.decoding import guards
from rwkv_speech.decoding.agreement import Agreement
from rwkv_speech.decoding.forks import Forks, Reading
from rwkv_speech.decoding.long_audio import Piece
from rwkv_speech.decoding.options import Options
from rwkv_speech.decoding.results import Segment, Word
from rwkv_speech.decoding.streaming import Committed, Event, LastCharacter, Partial, scored
from rwkv_speech.decoding.timestamps import WordTimes, split_words
from rwkv_speech.errors import UserError
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.text import join_texts

# Words end so long before they are committed; the piece is read so often.
HOLD_SECONDS, PACE_SECONDS = 0.5, 0.25
Scored = tuple[tuple[int, float], ...]  # tokens with their log-probabilities


def can_commit_words(model: SpeechLM, task: str, options: Options) -> bool:
    """Whether words of a task's texts are heard by a CTC head, and decoded so that none is taken back."""
    is_greedy = options.beam == 1 and not options.draft and not options.condition_on_previous_text
    is_greedy = is_greedy and options.temperatures[0] == 0
    return model.ctc is not None and is_greedy and tasks.base_of(task) == tasks.DEFAULT


class WordListener:
    """Commits words while a piece is being spoken, and takes none of them back.

    With `decode`, which makes a complete piece's segments, these are what it makes, whatever was committed before: then
    the transcript does not depend on how often the open piece was heard. What they add to the words is committed: where
    the whole says some of the words otherwise, what it says behind them.
    """

    def __init__(
        self,
        model: SpeechLM,
        options: Options,
        task: str,
        hold: float,
        decode: Callable[[Piece], list[Segment]] | None = None,
    ) -> None:
        if model.ctc is None:
            raise UserError(
                "commit: found word, but the weights have no CTC head, which says when a word ended; train one with "
                "--ctc 1, or take commit=segment"
            )
        if options.beam > 1 or options.draft or options.temperatures[0] > 0 or options.condition_on_previous_text:
            raise UserError(
                "commit: found word with beam, draft, condition_on_previous_text or a first temperature above 0, "
                "expected none of them: words that are never taken back are decoded greedily, each piece by itself; "
                "leave them out, or take commit=segment"
            )
        if model.separator_of(task) is not None:
            raise UserError(
                f"commit: found word, but task {task} writes what it hears before its text, expected one that does not "
                "(--transcribe_first); take commit=segment"
            )
        if not hold >= 0:
            raise UserError(f"hold: found {hold}, expected seconds from 0 on")
        self._tokenizer, self._times = model.tokenizer, WordTimes(model.ctc, model.encoder)
        self._frame_rate = model.encoder.framing.frame_rate
        self._forks, self._last, self._decode = Forks(model, task, options), LastCharacter(), decode
        self._words = Agreement(hold)  # of the open piece
        self._num_segments = 0

    def hear(self, piece: Piece | None) -> list[Event]:
        """The words that are certain, and what seems to follow them."""
        events = self._close_dropped(piece)
        if piece is None:
            return events
        text, words, reading = self._read(piece, self._forks.read)
        known = _text(self._words.committed)
        new = self._words.add(words, piece.end / SAMPLE_RATE)
        if new:
            scored = zip(reading.hypothesis.ids, reading.hypothesis.logprobs, strict=False)
            logprobs = self._of_part(tuple(scored), text, len(known), len(known) + len(_text(new)))
            events.append(Committed(self._last.commit(_text(new), not known), new, logprobs=logprobs))
        rest = text[len(_text(self._words.committed)) :]
        return [*events, Partial(rest if self._words.committed else self._last.joined(rest))]

    def close(self, piece: Piece) -> list[Event]:
        """The rest of its words, after one more reading of the whole; words that lie behind it are the next one's."""
        if self._decode:
            return list(self._decoded(self._decode, piece))
        text, words, reading = self._read(piece, self._forks.read_whole)
        ended = self._words.end_piece(piece.end / SAMPLE_RATE)
        new = words[len(ended) :]
        if self._words.committed:  # nothing can be put before them
            text, new = _text(ended), []
        if not text:
            return []
        segment = self._segment(text, [*ended, *new], piece.start, piece.end, reading)
        return [Committed(self._last.commit(text[len(_text(ended)) :], not ended), new, segment)]

    def finish(self) -> list[Event]:
        """What was committed and is no segment yet."""
        return self.hear(None)

    def _decoded(self, decode: Callable[[Piece], list[Segment]], piece: Piece) -> Iterator[Event]:
        self._forks.restart()
        known = _text(self._words.end_piece(piece.end / SAMPLE_RATE))
        segments, whole = decode(piece), ""
        text = join_texts(segment.text for segment in segments)
        covered, is_other = num_covered(known, text), not text.startswith(known)
        for segment in segments:
            before, whole = whole, join_texts([whole, segment.text])
            start = max(covered, len(before))
            rest, first = whole[start:], len(segment.text) - len(whole) + start  # where the rest begins in its text
            logprobs = self._of_part(scored(segment), segment.text, max(0, first), len(segment.text))
            found = replace(segment, id=self._num_segments)
            yield Committed(self._last.commit(rest, is_other or start == len(before)), [], found, logprobs)
            self._num_segments += 1

    def _of_part(self, known: Scored, text: str, first: int, end: int) -> Scored:
        """The tokens that begin between two characters of the text that all of them are."""
        low, high = (len(text[:place].encode("utf-8", "replace")) for place in (first, end))
        starts = [0, *accumulate(len(self._tokenizer.decode_bytes([token])) for token, _ in known)]
        return tuple(x for x, start in zip(known, starts, strict=False) if low <= start < high)

    def _close_dropped(self, piece: Piece | None) -> list[Event]:
        """The segment of words that were committed in a piece which turned out to be too short for one."""
        known = self._words.committed
        if not known or (piece is not None and piece.start <= known[-1].end * SAMPLE_RATE):
            return []
        ended = self._words.end_piece()
        if self._decode:
            return []
        start, end = (round(second * SAMPLE_RATE) for second in (ended[0].start, ended[-1].end))
        return [Committed("", [], self._segment(_text(ended), ended, start, end))]

    def _read(self, piece: Piece, read: Callable[[Piece, str], Reading]) -> tuple[str, list[Word], Reading]:
        """What a piece says: the committed words, as they were, and those that follow; together they are the text."""
        known = self._words.committed
        reading = read(piece, _text(known))
        text = reading.text.rstrip()
        assert reading.ctc is not None
        found = self._times.words(text, reading.ctc, piece.start / SAMPLE_RATE, piece.end / SAMPLE_RATE)
        ends = list(accumulate(len(word.word) for word in found))
        # What a reading adds to a committed word, such as a comma, comes with the next one.
        bounds = pairwise([len(_text(known)), *ends[len(known) :]])
        others = zip(found[len(known) :], bounds, strict=True)
        return text, [*known, *(replace(word, word=text[start:end]) for word, (start, end) in others)], reading

    def _segment(self, text: str, words: list[Word], start: int, end: int, reading: Reading | None = None) -> Segment:
        self._num_segments += 1
        return Segment(
            id=self._num_segments - 1,
            start=start / SAMPLE_RATE,
            end=end / SAMPLE_RATE,
            text=text,
            tokens=self._tokenizer.encode(text),
            temperature=0.0,
            avg_logprob=reading.hypothesis.avg_logprob if reading else 0.0,
            compression_ratio=guards.compression_ratio(text),
            no_speech_prob=guards.no_speech_prob(reading.ctc, self._frame_rate) if reading else 0.0,
            cut=reading is not None and reading.hypothesis.cut,
            words=words,
        )


def num_covered(known: str, text: str) -> int:
    """How many of a text's characters stand for words that are known already, some of which it may say otherwise.

    They are the first words of it that are the nearest, by edits of whole words, to those that are known; of several,
    those that end in the same word.
    """
    if text.startswith(known):
        return len(known)
    words, mine = split_words(text), [_plain(word) for word in split_words(known)]
    theirs = [_plain(word) for word in words]
    edits = list(range(len(words) + 1))  # from the known words to so many of the text's
    for row, word in enumerate(mine, start=1):
        diagonal, edits[0] = edits[0], row
        for column, other in enumerate(theirs, start=1):
            best = min(edits[column] + 1, edits[column - 1] + 1, diagonal + (word != other))
            diagonal, edits[column] = edits[column], best

    def rank(count: int) -> tuple[int, bool, int]:
        return edits[count], theirs[max(0, count - 1) : count] != mine[-1:], abs(count - len(mine))

    return len("".join(words[: min(range(len(edits)), key=rank)]))


def _plain(word: str) -> str:
    return "".join(character for character in word.casefold() if character.isalnum()) or word.strip()


def _text(words: Iterable[Word]) -> str:
    return "".join(word.word for word in words)
