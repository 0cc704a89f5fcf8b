"""From flags to what training iterates over: sources, changes of the audio, kept features."""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from rwkv_speech.config import TEXT, TrainConfig, numbers
from rwkv_speech.data.augment import Augment, Augmenter
from rwkv_speech.data.dataset import Fit, SpeechDataset
from rwkv_speech.data.feature_cache import FeatureCache
from rwkv_speech.data.source import Columns, Source
from rwkv_speech.data.sources import open_sources
from rwkv_speech.errors import UserError
from rwkv_speech.models.checkpoint import Trained
from rwkv_speech.models.speech_lm import SpeechLM
from rwkv_speech.tasks import BY_LANG, DEFAULT, Naming, base_of
from rwkv_speech.training.progress import say

if TYPE_CHECKING:
    from rwkv_speech.data.streaming import Stream, StreamedData

PREFIX = "hf-stream:"
_LOOKED_AT = 1000


def open_train_and_valid(config: TrainConfig) -> "tuple[Source | Stream, Source | None]":
    """The sources of --train_data and --valid_data; raises UserError for what cannot be read."""
    if not config.train_data:
        raise UserError("--train_data: found nothing, expected a manifest, a folder or a dataset to train on")
    train: Source | Stream
    if config.train_data.startswith(PREFIX):
        # Imported here: `datasets` takes a second, and manifests never need it.
        from rwkv_speech.data.streaming import open_stream

        train = open_stream(config.train_data, Columns(config.audio_column, config.text_column))
    else:
        train = _open(config, config.train_data)
    return train, _open(config, config.valid_data) if config.valid_data else None


def _open(config: TrainConfig, spec: str) -> Source:
    return open_sources(spec, audio_column=config.audio_column, text_column=config.text_column)


def naming_of(config: TrainConfig) -> Naming:
    """Which state an utterance of the training has."""
    return Naming(config.task, by_lang=config.state_by == BY_LANG)


def state_names(
    config: TrainConfig, train: "Source | Stream", valid: Source | None, start: Trained | None = None
) -> tuple[list[str], list[str]]:
    """The states to learn, those of the training data and of --states, and the states that the model has in all.

    These are more where the adapter stays what it is in `start`, and with it all of its states. Says how many
    utterances each has, and what is left out. Raises UserError for validation data of a task that has no state.
    """
    if start and config.adapter_stays and config.input != TEXT:
        start.require_adapter()
    extra = config.states.split(",") if config.states else []
    is_stream = config.train_data.startswith(PREFIX)
    found = Counter({config.task: 0}) if is_stream else _counted(config, cast(Source, train))
    names = sorted({*found, *extra})
    if names != [DEFAULT]:
        say(
            "states: " + ", ".join(f"{name}" if is_stream else f"{name} ({found[name]:,} utterances)" for name in names)
        )
    others = sorted(set(start.initial_states) - set(names)) if start else []
    kept = others if config.adapter_stays else []
    if others:
        what = "keeps its states" if kept else "--freeze none: leaves out its states, which the training data lacks:"
        say(f"{config.init_from}: {what} {', '.join(others)}")
    strange = sorted(set(_counted(config, valid)) - {*names, *kept}) if valid is not None else []
    if strange:
        raise UserError(
            f"--valid_data: found utterances of the task {strange[0]!r}, expected those of the training data, "
            f"{', '.join(names)}; add some to --train_data, or leave them out"
        )
    return names, sorted({*names, *kept})


def transcribing(config: TrainConfig, learned: Sequence[str], start: Trained | None = None) -> list[str]:
    """The states to learn that say first what they hear: those of --transcribe_first, and that did so in `start`.

    Raises UserError for tasks that cannot do so or are not learned, and with --loss kl.
    """
    asked = config.transcribe_first.split(",") if config.transcribe_first else []
    for name in asked:
        if base_of(name) in (DEFAULT, "chat"):
            why = "its text is what is heard" if base_of(name) == DEFAULT else "its turns may be text"
            raise UserError(f"--transcribe_first: found {name}, expected tasks such as qa, st: {why}; leave it out")
        if not any(name in (state, base_of(state)) for state in learned):
            raise UserError(
                f"--transcribe_first: found {name}, expected tasks of the training data, {', '.join(learned)}; leave "
                "it out, or add such utterances"
            )
    before = start.parts.transcribes if start and start.parts else ()
    names = [x for x in learned if x in before or x in asked or base_of(x) in asked]
    if names and config.loss == "kl":
        raise UserError(
            f"--loss: found kl with {', '.join(names)} of --transcribe_first, or of --init_from, expected ce: the "
            "teacher reads the transcript, and cannot say how to write it"
        )
    if names:
        say(f"transcribe first: {', '.join(names)}")
    return names


def _counted(config: TrainConfig, source: Source) -> Counter[str]:
    """The utterances of each state."""
    counts = Counter[str]()
    for pair, count in source.tasks().items():
        counts[naming_of(config).state(*pair)] += count
    return counts


def make_augmenter(config: TrainConfig) -> Augmenter | None:
    """The changes of the training audio that the flags ask for, None for none."""
    settings = Augment(
        speed=numbers(config.speed),
        volume_db=numbers(config.volume_db),
        noise_dir=config.noise_dir,
        noise_snr_db=numbers(config.noise_snr_db),
        time_masks=config.time_masks,
        time_mask_seconds=config.time_mask_seconds,
        freq_masks=config.freq_masks,
        freq_mask_hz=config.freq_mask_hz,
    )
    return Augmenter(settings, config.seed) if settings.flags_on else None


def make_datasets(
    config: TrainConfig, model: SpeechLM, train: "Source | Stream", valid: Source | None
) -> "tuple[SpeechDataset | StreamedData, SpeechDataset | None, FeatureCache | None]":
    """Training and validation data as the model wants them, and the cache that the training data reads."""
    normalise, naming, reads_text = model.encoder.do_normalize, naming_of(config), config.input == TEXT
    validation = None
    if valid is not None:
        validation = SpeechDataset(
            valid, model.tokenizer, config.label_mode, naming=naming, normalise=normalise, reads_text=reads_text
        )
    settings: dict[str, Any] = {
        "tokenizer": model.tokenizer,
        "label_mode": config.label_mode,
        "naming": naming,
        "fit": Fit(config.ctx_len, model.adapter.stack, model.encoder.framing),
        "normalise": normalise,
        "teacher_form": config.kl_form if config.loss == "kl" else "",
        "reads_text": reads_text,
        "transcribes": model.parts.transcribes,
        "separator": model.parts.separator,
    }
    augment = make_augmenter(config)
    if config.train_data.startswith(PREFIX):
        return _streamed(config, train, functools.partial(SpeechDataset, **settings), augment), validation, None
    if config.loss == "kl":
        say(_taught(cast(Source, train)))
    cache = None
    if config.feature_cache:
        cache = FeatureCache(config.feature_cache, model.encoder.fingerprint(), config.feature_dtype)
    data = SpeechDataset(cast(Source, train), **settings, augment=augment, cache=cache)
    if note := data.count_too_long():
        say(note)
    return data, validation, cache


def _taught(source: Source) -> str:
    """Say how much of the data --loss kl is for, looking at some of it; raises UserError if nothing is."""
    looked_at = range(0, len(source), max(1, len(source) // _LOOKED_AT))
    count = sum(bool(source.utterance(index).question) for index in looked_at)
    if not count:
        raise UserError(
            f"--loss: kl compares answers with those of the text model, but none of {len(looked_at)} lines of "
            "--train_data has an answer and a source_text; add them (python -m rwkv_speech make_answers), or take ce"
        )
    return f"{count} of {len(looked_at)} lines looked at are learned by KL, the others by cross-entropy"


def _streamed(
    config: TrainConfig, train: "Source | Stream", build: Callable[..., SpeechDataset], augment: Augmenter | None
) -> "StreamedData":
    from rwkv_speech.data.streaming import Stream, StreamedData

    if config.feature_cache or config.plan:
        flag = "--feature_cache" if config.feature_cache else "--plan"
        raise UserError(
            f"{flag}: {config.train_data} arrives row by row; expected data that can be gone through: a "
            "manifest, a folder, tar shards or a set on the disk"
        )
    return StreamedData(cast(Stream, train), build, augment)
