"""Pretrains the tiny WavLM: masked frames of synthetic speech in five languages -> the phone at every frame."""

import copy
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import WavLMConfig, WavLMModel

from rwkv_speech.audio import SAMPLE_RATE, length_mask
from rwkv_speech.errors import exit_code
from rwkv_speech.flags import OutFlags, flag, parse
from rwkv_speech.models.encoder import normalise
from rwkv_speech.synthetic.phones import LANGUAGES, PHONES
from rwkv_speech.synthetic.rooms import augment
from rwkv_speech.synthetic.speech_pool import FRAMING, LabelledSpeech, speech_pool
from rwkv_speech.synthetic.voices import TEST_VARIANTS, TRAIN_VARIANTS
from rwkv_speech.tiny import CONV_KERNELS, CONV_STRIDES

CONFIG: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "conv_dim": (128, 128, 128),
    "conv_kernel": CONV_KERNELS,
    "conv_stride": CONV_STRIDES,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "num_conv_pos_embeddings": 32,
    "num_conv_pos_embedding_groups": 8,
    "num_buckets": 64,
    "max_bucket_distance": 200,
    "layerdrop": 0.0,
    "hidden_dropout": 0.05,
    "attention_dropout": 0.05,
    "activation_dropout": 0.0,
    "mask_time_prob": 0.2,
    "mask_time_length": 5,
}
_IGNORED = -100


def _batches(pool: list[LabelledSpeech], seconds: float, g: torch.Generator) -> list[list[LabelledSpeech]]:
    """Batches of similar length, about `seconds` each, in random order."""
    jitter = torch.rand(len(pool), generator=g).tolist()
    order = sorted(range(len(pool)), key=lambda i: len(pool[i].waveform) * (0.9 + 0.2 * jitter[i]))
    batches: list[list[LabelledSpeech]] = [[]]
    for i in order:
        if sum(len(u.waveform) for u in batches[-1]) > seconds * SAMPLE_RATE:
            batches.append([])
        batches[-1].append(pool[i])
    return [batches[i] for i in torch.randperm(len(batches), generator=g).tolist()]


def _tensors(
    batch: list[LabelledSpeech], g: torch.Generator, strength: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised waveforms (B, S), their mask (B, S) and the labels (B, F)."""
    sizes = torch.tensor([len(u.waveform) for u in batch])
    waveforms = nn.utils.rnn.pad_sequence(
        [torch.from_numpy(u.waveform).float() / 32768 for u in batch], batch_first=True
    )
    waveforms = normalise(augment(waveforms, g, strength), sizes)
    labels = torch.full((len(batch), FRAMING.count(waveforms.shape[1])), _IGNORED)
    for row, utterance in zip(labels, batch, strict=True):
        row[: len(utterance.labels)] = torch.from_numpy(utterance.labels.astype(np.int64))
    return waveforms, length_mask(sizes, waveforms.shape[1]).long(), labels


def _accuracy(model: nn.Module, head: nn.Module, pool: list[LabelledSpeech]) -> dict[str, float]:
    """The share of the frames whose phone is guessed right, by language."""
    model.eval()
    shares = {}
    with torch.no_grad():
        for lang in LANGUAGES:
            g, right, total = torch.Generator().manual_seed(1), 0, 0
            for batch in _batches([u for u in pool if u.lang == lang], 60.0, g):
                waveforms, mask, labels = _tensors(batch, g, 1.0)
                guess = head(model(waveforms, attention_mask=mask).last_hidden_state).argmax(-1)
                right += int((guess == labels)[labels != _IGNORED].sum())
                total += int((labels != _IGNORED).sum())
            shares[lang] = right / max(1, total)
    model.train()
    return shares


@torch.no_grad()
def initialise(model: WavLMModel) -> None:
    """Start the convolutions as a filter bank: sines and cosines on the mel scale, then their smoothed envelopes."""
    layers: Any = model.feature_extractor.conv_layers
    first, *others = (layer.conv.weight for layer in layers)
    channels, _, size = first.shape
    lowest, highest = 80.0, 7600.0
    mel = torch.linspace(math.log1p(lowest / 700), math.log1p(highest / 700), channels // 2)
    hertz = 700 * torch.expm1(mel)[:, None]
    time = (torch.arange(size) - (size - 1) / 2) / SAMPLE_RATE
    bandwidth = (0.09 * hertz).clamp_min(36.0)
    window = torch.exp(-0.5 * (2 * math.pi * bandwidth * time) ** 2) * torch.hann_window(size, periodic=False)
    phase = 2 * math.pi * hertz * time
    filters = torch.cat((window * phase.cos(), window * phase.sin()))
    first.copy_((filters / filters.norm(dim=1, keepdim=True))[:, None])
    for weight in others:
        smoothing = torch.hann_window(weight.shape[2] + 2, periodic=False)[1:-1]
        smoothing = smoothing / smoothing.sum()
        weight.normal_(std=0.01)
        channel = torch.arange(channels)
        weight[channel, channel] += smoothing
        weight[channel, (channel + channels // 2) % channels] += smoothing


@dataclass(frozen=True)
class Flags(OutFlags):
    """python -m rwkv_speech.synthetic.pretrain_encoder"""

    hours: float = flag(6.0, "hours of synthetic speech", above=0)
    epochs: int = flag(4, "epochs", at_least=1)
    batch_seconds: float = flag(10.0, "seconds of audio a step", above=0)
    lr: float = flag(1.5e-3, "learning rate", at_least=0)
    init_from: str = flag("", "folder of an encoder to start from; else random weights")


def pretrain(config: Flags) -> dict[str, float]:
    """Trains, writes the folder (fp16 safetensors and config), returns what the card states."""
    torch.manual_seed(config.seed)
    g = torch.Generator().manual_seed(config.seed)
    started = time.time()
    pool = speech_pool(config.hours, TRAIN_VARIANTS, config.seed)
    unseen = speech_pool(0.2, TEST_VARIANTS, config.seed + 1)
    print(f"{len(pool)} utterances synthesised in {time.time() - started:.0f} s", flush=True)
    if config.init_from:
        model = WavLMModel.from_pretrained(config.init_from, dtype=torch.float32)
    else:
        model = WavLMModel(WavLMConfig(**CONFIG))
        initialise(model)
    head = nn.Linear(CONFIG["hidden_size"], len(PHONES))
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.01, betas=(0.9, 0.98))
    steps = config.epochs * len(_batches(pool, config.batch_seconds, g))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 200, 0.5 * (1 + math.cos(math.pi * min(1.0, s / steps))) + 1e-3)
    )
    accuracy, step = dict[str, float](), 0
    for epoch in range(config.epochs):
        model.train()
        for batch in _batches(pool, config.batch_seconds, g):
            waveforms, mask, labels = _tensors(batch, g, min(1.0, step / (0.2 * steps)))
            with torch.autocast("cpu", torch.bfloat16):
                logits = head(model(waveforms, attention_mask=mask).last_hidden_state)
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=_IGNORED)
            optimizer.zero_grad()
            loss.backward()
            if torch.isfinite(nn.utils.clip_grad_norm_(parameters, 1.0)):
                optimizer.step()
            schedule.step()
            step += 1
            if step % 100 == 0:
                print(f"step {step}/{steps} loss {loss:.3f} {time.time() - started:.0f} s", flush=True)
        accuracy = _accuracy(model, head, unseen)
        shares = " ".join(f"{lang} {share:.3f}" for lang, share in accuracy.items())
        print(f"epoch {epoch + 1}: frames of unseen speakers right: {shares}", flush=True)
        copy.deepcopy(model).half().save_pretrained(config.out)
    minutes = (time.time() - started) / 60
    return {"hours": config.hours, "epochs": config.epochs, "minutes": minutes, **accuracy}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the encoder's half of demo/pretrain-tiny.sh."""
    return exit_code(lambda: print(pretrain(parse(Flags, argv, __doc__ or ""))))


if __name__ == "__main__":
    sys.exit(main())
