"""Languages that a base model does not know: its texts say so before training, the loss of validation afterwards."""

# T positions of the packed batch · V vocabulary

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from rwkv_speech.batch import Batch
from rwkv_speech.data.loader import collate
from rwkv_speech.data.source import Source
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.models.state import Packing
from rwkv_speech.tasks import task_named
from rwkv_speech.text import normalise_label

# Texts of each language, among so many utterances; fewer bytes than these say little.
_TEXTS, _UTTERANCES, _BYTES = 16, 400, 200
_USUAL = "below 2 are usual of a language that it knows"


class Languages:
    """Notes once of each language that its texts are no likelier to the model than to the frequencies of their bytes.

    Of a language that a model knows it needs a quarter or half of those bits (1 to 2 a byte); the embedded one needs
    1.0 of its own sentences, against 4.0, and 8.1 of German ones, against 4.2. The measure is the sample's own, so that
    it serves every script. Answers and classes, which may be single words, are not looked at.
    """

    def __init__(self, model: SpeechLM) -> None:
        self._model = model
        self._noted = set[str]()
        self._heard = defaultdict[str, list[tuple[str, float]]](list)  # texts of this validation, and their loss

    @torch.no_grad()
    def read(self, source: Source, label_mode: str) -> list[str]:
        """A line for each language of whose texts the frozen model, in its own usual state, says so."""
        texts = defaultdict[str, list[str]](list)
        for index in np.unique(np.linspace(0, len(source) - 1, min(len(source), _UTTERANCES)).astype(int)).tolist():
            for turn in source.utterance(index).turns:
                mine = texts[turn.lang or ""]
                if is_language(turn.task, turn.answers) and len(mine) < _TEXTS:
                    mine.append(normalise_label(turn.text, label_mode))
        return self._notes({lang: (found, text_bits(self._model, found)) for lang, found in texts.items() if found},
                           "before training the base model needs")  # fmt: skip

    @torch.no_grad()
    def hear(self, batch: Batch) -> None:
        """Take the loss of some utterances of each language of a validation."""
        for sample in batch.samples():
            heard = self._heard[sample.lang or ""]
            if not sample.turn and is_language(sample.task, sample.answers) and len(heard) < _TEXTS:
                loss = float(self._model(collate([sample])))
                heard.append((sample.text, loss / math.log(2)))

    def heard(self) -> list[str]:
        """A line for each language of which this validation says so; the next one begins."""
        found = {
            lang: ([text for text, _ in rows], sum(bits for _, bits in rows)) for lang, rows in self._heard.items()
        }
        self._heard.clear()
        return self._notes(found, "validation needs")

    def _notes(self, found: dict[str, tuple[list[str], float]], head: str) -> list[str]:
        lines = list[str]()
        for lang, (texts, bits) in sorted(found.items()):
            size = sum(len(text.encode()) for text in texts)
            if size < _BYTES or lang in self._noted or (bits := bits / size) < (chance := byte_entropy(texts)):
                continue
            self._noted.add(lang)
            lines.append(
                f"note: texts {f'of lang {lang}' if lang else 'without lang'}: {head} {bits:.1f} bits a byte, and how "
                f"often each byte comes says {chance:.1f}; {_USUAL}: it may not know such text"
            )
        return lines


def is_language(task: str | None, answers: Sequence[str]) -> bool:
    """Whether texts of a task are language, not single words."""
    return not answers and task_named(task or "asr").measure in ("wer", "bleu")


def byte_entropy(texts: Sequence[str]) -> float:
    """The entropy of the bytes of texts, each by itself, in bits: what is needed by who knows their frequencies."""
    counts = Counter("".join(texts).encode())
    return -sum(n * math.log2(n / counts.total()) for n in counts.values()) / counts.total()


@torch.no_grad()
def text_bits(model: SpeechLM, texts: Sequence[str]) -> float:
    """The bits that the language model needs for texts, each behind id 0, which is how a document starts."""
    rows = [torch.tensor([0, *model.tokenizer.encode(text)]) for text in texts]
    cu_seqlens = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    device = next(model.trained_parameters()).device
    packing, state = Packing.of(cu_seqlens).to(device), model.lm.zero_state(len(rows))
    hidden, _ = model.lm.hidden(model.lm.embed(torch.cat(rows).to(device))[None], state, packing, False)
    before = torch.ones(int(cu_seqlens[-1]), dtype=torch.bool)
    before[cu_seqlens[1:] - 1] = False
    targets = torch.cat([row[1:] for row in rows])
    return float(model.lm.head(hidden[0][before.to(device)], targets.to(device))) / math.log(2)
