"""Whisper's encoder against transformers' own."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import rms_error
from safetensors.torch import load_file, save_file
from tiny_encoders import batch_of, save, sound
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperModel

from rwkv_speech.errors import UserError
from rwkv_speech.models.encoder import SpeechEncoder
from rwkv_speech.models.encoder_whisper import log_mel
from rwkv_speech.models.parts import FrameOptions, Parts
from rwkv_speech.models.speech_lm import SpeechLM

WINDOW = 30 * 16_000


def make_whisper(positions: int = 1500, mels: int = 80, whole: type = WhisperModel) -> Any:
    """A tiny model whose weights are large enough for positions and biases to matter."""
    config = WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=60, num_mel_bins=mels, max_source_positions=positions,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = whole(config).eval().requires_grad_(False)
    for x in model.parameters():
        x.copy_(torch.randn_like(x) * 0.2 if x.dim() > 1 else x + 0.3 * torch.randn_like(x))
    return model


@pytest.fixture(scope="module")
def whisper() -> Any:
    return make_whisper()


def theirs(waveform: Tensor, samples: int = WINDOW, mels: int = 80) -> Tensor:
    """transformers' own features of a waveform with silence up to so many samples, (1, mels, M)."""
    extractor = WhisperFeatureExtractor(feature_size=mels)
    padded = nn.functional.pad(waveform, (0, samples - len(waveform)))
    found = extractor(padded.numpy(), sampling_rate=16_000, return_tensors="pt", padding="do_not_pad")
    return found.input_features


def of_truncated(model: Any, mel: Tensor) -> Tensor:
    """transformers' own layers over the first positions, (P, D), of a model that else takes 30 s alone."""
    encoder = model.encoder
    x = nn.functional.gelu(encoder.conv2(nn.functional.gelu(encoder.conv1(mel)))).transpose(1, 2)
    x = x + encoder.embed_positions.weight[: x.shape[1]]
    for layer in encoder.layers:
        x = layer(x, None)
    return encoder.layer_norm(x)[0]


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("samples", [WINDOW, 40_077])
def test_log_mel_equals_transformers_own(mels: int, samples: int):
    x = sound(samples) * torch.linspace(0, 1, samples)  # the quietest lie 80 dB below the loudest
    got = log_mel(x[None], torch.tensor([samples]), mels)
    assert got.shape == (1, mels, samples // 160)
    torch.testing.assert_close(got, theirs(x, samples, mels), rtol=0, atol=1e-5)


def test_log_mel_of_a_batch_ends_where_each_waveform_ends():
    waveforms, num_samples = batch_of([9_000, 3_001, 4_000], padding=9.0)
    got = log_mel(waveforms, num_samples, 80)
    for row, samples in enumerate(num_samples.tolist()):
        want = log_mel(waveforms[row : row + 1, :samples], num_samples[row : row + 1], 80)
        torch.testing.assert_close(got[row, :, : samples // 160], want[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("samples", [48_000, 8_001, 320])
def test_short_audio_is_encoded_at_its_length_and_half_a_second(whisper: Any, samples: int):
    frames, lengths = SpeechEncoder(copy.deepcopy(whisper), "w")(sound(samples)[None], torch.tensor([samples]))
    assert frames.shape == (1, samples // 320, 32) and lengths.tolist() == [samples // 320]
    want = of_truncated(whisper, theirs(sound(samples), samples + 8_000))
    torch.testing.assert_close(frames[0], want[: lengths[0]], rtol=0, atol=1e-5)


def test_padded_to_30_s_it_is_transformers_own_model(whisper: Any):
    encoder = SpeechEncoder(copy.deepcopy(whisper), "w", options=FrameOptions(30))
    for samples in (WINDOW, 20_000):
        frames, lengths = encoder(sound(samples)[None], torch.tensor([samples]))
        want = whisper.encoder(theirs(sound(samples))).last_hidden_state
        assert lengths.tolist() == [samples // 320] == [frames.shape[1]]
        torch.testing.assert_close(frames, want[:, : lengths[0]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("padding", [0.0, 2.0])
@pytest.mark.parametrize("crop", [True, False])
def test_a_batch_equals_each_alone(padding: float, crop: bool):
    encoder = SpeechEncoder(make_whisper(positions=50), "w", options=FrameOptions(padding))  # windows of 1 s
    waveforms, num_samples = batch_of([15_000, 0, 319, 320, 16_000, 40_000, 7_777], padding=0.3)
    frames, lengths = encoder(waveforms, num_samples, crop=crop)
    assert lengths.tolist() == [46, 0, 0, 1, 50, 125, 24] and frames.shape == (7, 125, 32)
    assert torch.isfinite(frames).all()
    for row, samples in enumerate(num_samples.tolist()):
        alone, [length] = encoder(waveforms[row : row + 1, :samples], num_samples[row : row + 1])
        assert alone.shape[1] == max(1, length)
        torch.testing.assert_close(frames[row, :length], alone[0, :length], rtol=0, atol=1e-5)


def test_longer_audio_is_encoded_window_by_window():
    encoder = SpeechEncoder(make_whisper(positions=50), "w")
    x = sound(40_000)[None]
    frames, lengths = encoder(x, torch.tensor([40_000]))
    parts = [encoder(part, torch.tensor([part.shape[1]]))[0] for part in x.split(16_000, 1)]
    assert lengths.tolist() == [125]
    torch.testing.assert_close(frames, torch.cat(parts, 1), rtol=0, atol=1e-5)


def test_bfloat16_is_near_and_keeps_convolutions_and_norms(whisper: Any):
    narrow: Any = SpeechEncoder(copy.deepcopy(whisper), "w", dtype=torch.bfloat16)
    waveforms, num_samples = batch_of([9_000, 5_000])
    (want, lengths), (got, _) = SpeechEncoder(whisper, "w")(waveforms, num_samples), narrow(waveforms, num_samples)
    assert got.dtype == torch.float32
    for row, length in enumerate(lengths.tolist()):
        assert 1e-4 < rms_error(got[row, :length], want[row, :length]) < 2e-2
    layer = narrow.model.layers[0]
    assert layer.fc1.weight.dtype == torch.bfloat16 != layer.final_layer_norm.weight.dtype
    assert narrow.model.conv1.weight.dtype == narrow.model.embed_positions.weight.dtype == torch.float32


@pytest.mark.parametrize("whole", [WhisperModel, WhisperForConditionalGeneration])
def test_from_pretrained_reads_the_encoder_alone(tmp_path: Path, whole: type, capfd: pytest.CaptureFixture[str]):
    model = make_whisper(whole=whole).half()
    inner = getattr(model, "model", model)
    save(tmp_path / "whole", model)
    capfd.readouterr()
    encoder = SpeechEncoder.from_pretrained(tmp_path / "whole")
    assert capfd.readouterr() == ("", "")
    assert sum(x.numel() for x in encoder.parameters()) == sum(x.numel() for x in inner.encoder.parameters())
    assert not encoder.do_normalize and not any(x.requires_grad for x in encoder.parameters())
    for name, x in inner.encoder.state_dict().items():
        assert torch.equal(encoder.model.state_dict()[name], x.float())
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    alone = {name: x for name, x in tensors.items() if "encoder." in name and "decoder" not in name}
    save_file(alone, tmp_path / "alone" / "model.safetensors", {"format": "pt"})
    assert SpeechEncoder.from_pretrained(tmp_path / "alone").fingerprint() == encoder.fingerprint()
    del alone[min(alone)]
    save_file(alone, tmp_path / "alone" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 tensors"):
        SpeechEncoder.from_pretrained(tmp_path / "alone")


def test_fingerprint_tells_paddings_apart(whisper: Any):
    keys = [
        SpeechEncoder(copy.deepcopy(whisper), "w", options=FrameOptions(padding)).fingerprint()
        for padding in (None, 0, 30)
    ]
    assert keys[0] == keys[1] != keys[2]


def test_several_layers_are_those_of_transformers_side_by_side(whisper: Any):
    encoder = SpeechEncoder(copy.deepcopy(whisper), "w", options=FrameOptions(30, (1, 2)))
    frames, [length] = encoder(sound(20_000)[None], torch.tensor([20_000]))
    found = whisper.encoder(theirs(sound(20_000)), output_hidden_states=True)
    before_the_last, last = found.hidden_states[1], found.last_hidden_state
    want = torch.cat([nn.functional.layer_norm(x, (32,)) for x in (before_the_last, last)], -1)
    torch.testing.assert_close(frames, want[:, :length], rtol=0, atol=1e-5)


def test_padding_belongs_to_whisper_and_to_the_checkpoint(tiny_parts: Parts, tmp_path: Path):
    with pytest.raises(UserError, match=r"--encoder_padding: found 30 with encoder .* of type 'wavlm'"):
        SpeechLM.build(Parts(**{**vars(tiny_parts), "encoder_padding": 30.0}))
    parts = Parts(
        **{**vars(tiny_parts), "encoder": str(save(tmp_path / "w", make_whisper(50))), "encoder_padding": 1.0}
    )
    SpeechLM.build(parts).save(tmp_path / "run.safetensors")
    assert SpeechLM.from_pretrained(tmp_path / "run.safetensors").encoder.family.settings()["padding"] == 1.0
    with pytest.raises(UserError, match=r"--encoder_padding: found 0, but .*run.safetensors was trained with 1"):
        SpeechLM.from_pretrained(tmp_path / "run.safetensors", Parts(encoder_padding=0.0))
