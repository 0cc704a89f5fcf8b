"""What comes from the hub or a folder, and the key of it."""

import copy
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_encoders import batch_of, feature_extractor, large_shaped, make_model, save, sound
from transformers import BertConfig, Wav2Vec2Config

from rwkv_speech.errors import UserError
from rwkv_speech.models.encoder import SpeechEncoder


def test_from_pretrained_reads_float32_whatever_the_file_holds(tmp_path: Path):
    folder = save(tmp_path, make_model("wavlm", "layer", "seven").half())
    encoder = SpeechEncoder.from_pretrained(folder)
    assert {x.dtype for x in encoder.parameters()} == {torch.float32}
    assert encoder(*batch_of([800]))[0].dtype == torch.float32


@torch.no_grad()
def test_from_pretrained_respects_do_normalize(tmp_path: Path):
    model: Any = make_model("wavlm", "layer", "seven")
    plain = SpeechEncoder.from_pretrained(save(tmp_path, model, do_normalize=False))
    waveform = sound(2_000)[None]
    frames, _ = plain(waveform, torch.tensor([2_000]))
    torch.testing.assert_close(frames, model(waveform).last_hidden_state, rtol=0, atol=1e-5)
    (tmp_path / "preprocessor_config.json").unlink()
    by_default = SpeechEncoder.from_pretrained(tmp_path)
    expected = model(feature_extractor(waveform[0])).last_hidden_state
    torch.testing.assert_close(by_default(waveform, torch.tensor([2_000]))[0], expected, rtol=0, atol=1e-5)
    assert (expected - frames).abs().max() > 1e-2


@pytest.fixture
def cached_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache holds org/model without its preprocessor_config.json, and the hub is out of reach."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    root, commit = tmp_path / "models--org--model", "0" * 40
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    save(root / "snapshots" / commit, make_model("wavlm", "layer", "three"))
    return root


def test_from_pretrained_refuses_to_guess_at_settings_out_of_reach(cached_model: Path):
    with pytest.raises(UserError, match=r"encoder 'org/model': .*preprocessor_config.json.*hub in reach"):
        SpeechEncoder.from_pretrained("org/model")
    [snapshot] = (cached_model / "snapshots").iterdir()
    (snapshot / "preprocessor_config.json").write_text('{"do_normalize": false}')
    assert not SpeechEncoder.from_pretrained("org/model").do_normalize
    (snapshot / "preprocessor_config.json").write_text("cut o")
    with pytest.raises(UserError, match=r"preprocessor_config.json"):
        SpeechEncoder.from_pretrained("org/model")


def test_from_pretrained_normalises_where_the_hub_said_that_there_are_no_settings(cached_model: Path):
    [snapshot] = (cached_model / "snapshots").iterdir()
    (cached_model / ".no_exist" / snapshot.name).mkdir(parents=True)
    (cached_model / ".no_exist" / snapshot.name / "preprocessor_config.json").touch()
    assert SpeechEncoder.from_pretrained("org/model").do_normalize


def test_fingerprint_is_that_of_the_content(tmp_path: Path):
    """Not of the folder, the order of the file, or what is drawn at random for want of it."""
    model: Any = make_model("wavlm", "layer", "three")
    want = SpeechEncoder.from_pretrained(save(tmp_path / "one", model)).fingerprint()
    assert len(want) == 64
    save(tmp_path / "two", model)
    tensors = load_file(tmp_path / "two" / "model.safetensors")
    del tensors["masked_spec_embed"]
    save_file(dict(reversed(tensors.items())), tmp_path / "two" / "model.safetensors", {"format": "pt"})
    torch.manual_seed(5)
    assert SpeechEncoder.from_pretrained(tmp_path / "two").fingerprint() == want
    assert SpeechEncoder(model, "in memory").fingerprint() == want


def test_fingerprint_tells_apart_what_gives_other_frames():
    def encoder(**settings: Any) -> SpeechEncoder:
        model: Any = make_model("wavlm", "layer", "three")
        model.config.update(settings)
        return SpeechEncoder(model, "wavlm")

    changed = encoder()
    next(iter(changed.model.encoder.parameters())).view(-1)[-1] += 1e-6  # type: ignore[union-attr]
    swapped = encoder()
    attention = swapped.model.encoder.layers[0].attention  # type: ignore[union-attr, index]
    attention.q_proj, attention.k_proj = attention.k_proj, attention.q_proj
    model = make_model("wavlm", "layer", "three")
    fingerprints = [
        encoder().fingerprint(),
        encoder(layer_norm_eps=1e-4).fingerprint(),
        encoder(max_bucket_distance=65).fingerprint(),
        changed.fingerprint(),
        swapped.fingerprint(),
        SpeechEncoder(copy.deepcopy(model), "wavlm", do_normalize=False).fingerprint(),
        SpeechEncoder(model, "wavlm", dtype=torch.bfloat16).fingerprint(),
    ]
    assert len(set(fingerprints)) == len(fingerprints)
    assert encoder().fingerprint() == fingerprints[0]


def test_from_pretrained_names_a_folder_that_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match="give a folder, or an id such as microsoft/wavlm-large") as caught:
        SpeechEncoder.from_pretrained(tmp_path / "gone")
    assert str(tmp_path / "gone") in str(caught.value)


def test_from_pretrained_names_a_folder_without_weights(tmp_path: Path):
    make_model("wavlm", "layer", "seven").config.save_pretrained(tmp_path)  # type: ignore[union-attr, operator]
    with pytest.raises(UserError, match="weights") as caught:
        SpeechEncoder.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_from_pretrained_names_weights_that_cannot_be_read(tmp_path: Path):
    save(tmp_path, make_model("wavlm", "layer", "seven"))
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="weights") as caught:
        SpeechEncoder.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_from_pretrained_names_weights_that_are_not_all_there(tmp_path: Path):
    model: Any = make_model("wavlm", "layer", "seven")
    save(tmp_path, model)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["masked_spec_embed"]  # not in every published file, and not needed
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    SpeechEncoder.from_pretrained(tmp_path)
    del tensors["encoder.layers.1.attention.k_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 tensors, encoder\.layers\.1\.attention\.k_proj\.weight") as caught:
        SpeechEncoder.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_from_pretrained_refuses_an_encoder_with_an_adapter_of_its_own(tmp_path: Path):
    Wav2Vec2Config(add_adapter=True).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="add_adapter"):
        SpeechEncoder.from_pretrained(tmp_path)


def test_from_pretrained_names_a_wrong_model_type(tmp_path: Path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model type 'bert', expected one of .*wavlm.*hubert.*wav2vec2") as caught:
        SpeechEncoder.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_from_pretrained_reads_the_older_names_of_weight_norm(tmp_path: Path):
    """As the published WavLM files have them: weight_g and weight_v."""
    model = make_model("wavlm", "layer", "seven")
    save(tmp_path / "new", model)
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    older = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): x
        for name, x in tensors.items()
    }
    assert older.keys() - tensors.keys() == {f"encoder.pos_conv_embed.conv.weight_{part}" for part in "gv"}
    model.config.save_pretrained(tmp_path / "old")  # type: ignore[union-attr, operator]
    torch.save(older, tmp_path / "old" / "pytorch_model.bin")
    loaded = SpeechEncoder.from_pretrained(tmp_path / "old").model.state_dict()
    assert all(torch.equal(x, loaded[name]) for name, x in model.state_dict().items())


@pytest.mark.soak
def test_a_file_of_wavlm_large_s_shape_loads_and_encodes(tmp_path: Path):
    save(tmp_path, large_shaped(layers=24), do_normalize=True)
    encoder = SpeechEncoder.from_pretrained(tmp_path)
    assert encoder.width == 1024 and 300e6 < sum(x.numel() for x in encoder.parameters()) < 330e6
    frames, lengths = encoder(torch.randn(2, 16_000), torch.tensor([16_000, 9_000]))
    assert frames.shape == (2, 49, 1024) and lengths.tolist() == [49, 27]
