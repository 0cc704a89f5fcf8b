"""From flags to what training iterates over: sources, changes of the audio, kept features."""

from rwkv_speech.config import TrainConfig
from rwkv_speech.data.augment import Augment, Augmenter, numbers
from rwkv_speech.data.dataset import Fit, SpeechDataset
from rwkv_speech.data.feature_cache import FeatureCache
from rwkv_speech.data.sources import Source, open_sources
from rwkv_speech.errors import UserError
from rwkv_speech.speech_lm import SpeechLM


def open_train_and_valid(config: TrainConfig) -> tuple[Source, Source | None]:
    """The sources of --train_data and --valid_data; raises UserError for what cannot be read."""
    if not config.train_data:
        raise UserError("--train_data: found nothing, expected a manifest, a folder or a dataset to train on")
    opened = [
        open_sources(spec, audio_column=config.audio_column, text_column=config.text_column) if spec else None
        for spec in (config.train_data, config.valid_data)
    ]
    assert opened[0] is not None
    return opened[0], opened[1]


def make_augmenter(config: TrainConfig) -> Augmenter | None:
    """The changes of the training audio that the flags ask for, None for none."""
    settings = Augment(
        speed=numbers(config.speed, "--speed"),
        volume_db=numbers(config.volume_db, "--volume_db"),
        noise_dir=config.noise_dir,
        noise_snr_db=numbers(config.noise_snr_db, "--noise_snr_db"),
        time_masks=config.time_masks,
        time_mask_seconds=config.time_mask_seconds,
        freq_masks=config.freq_masks,
        freq_mask_hz=config.freq_mask_hz,
    )
    return Augmenter(settings, config.seed) if settings.flags_on else None


def make_datasets(
    config: TrainConfig, model: SpeechLM, train: Source, valid: Source | None
) -> tuple[SpeechDataset, SpeechDataset | None, FeatureCache | None]:
    """Training and validation data as the model wants them, and the cache that the training data reads."""
    normalise = model.encoder.do_normalize
    cache = None
    if config.feature_cache:
        cache = FeatureCache(config.feature_cache, model.encoder.fingerprint(), config.feature_dtype)
    training = SpeechDataset(
        train,
        model.tokenizer,
        config.label_mode,
        Fit(config.ctx_len, model.origin.stack),
        normalise=normalise,
        augment=make_augmenter(config),
        cache=cache,
    )
    validation = None
    if valid is not None:
        validation = SpeechDataset(valid, model.tokenizer, config.label_mode, normalise=normalise)
    return training, validation, cache
