import pytest
import torch

from rwkv_speech.config import ModelConfig, TrainConfig
from rwkv_speech.devices import Compute, accelerator, compute_of, torch_device, uses_bf16
from rwkv_speech.errors import UserError


@pytest.fixture(params=[0, 2])
def gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A machine that says it has so many GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    return request.param


def test_accelerator_and_types_follow_what_is_there(gpus: int):
    assert accelerator(ModelConfig()) == (("gpu", 1) if gpus else ("cpu", 1))
    for precision in ("auto", "int8", "nf4"):
        assert uses_bf16(ModelConfig(precision=precision)) == bool(gpus)
        assert not uses_bf16(ModelConfig(device="cpu", precision=precision))
    assert torch_device(ModelConfig()).type == ("cuda" if gpus else "cpu")
    assert accelerator(ModelConfig(device="cpu:3")) == ("cpu", 3)


def test_accelerator_names_gpus_that_are_not_there(gpus: int):
    with pytest.raises(UserError, match=f"--device: asked for 4 GPU.s., found {gpus}; .*cpu"):
        accelerator(ModelConfig(device="4"))
    assert accelerator(TrainConfig(device="4", plan=1)) == ("gpu", 4)


def test_compute_of_takes_every_flag():
    config = TrainConfig(device="cpu", precision="bf16", encoder_precision="fp32", wkv6="torch", compile=1)
    cpu = torch.device("cpu")
    assert compute_of(config) == Compute(cpu, torch.bfloat16, torch.float32, "torch", True)
    assert compute_of(ModelConfig(device="cpu")) == Compute(cpu)
    assert compute_of(config, "meta").device == "meta"
    for precision in ("int8", "nf4"):  # what is not packed
        assert compute_of(ModelConfig(device="cpu", precision=precision)) == Compute(cpu, torch.bfloat16)
        assert compute_of(TrainConfig(device="cpu", precision=precision)) == Compute(cpu)


def test_encoder_precision_follows_precision_unless_given():
    bf16, fp32 = torch.bfloat16, torch.float32
    for given, own, wanted in (
        ("fp32", "auto", fp32),
        ("bf16", "auto", bf16),
        ("bf16", "fp32", fp32),
        ("fp32", "bf16", bf16),
        ("bf16", "int8", bf16),
        ("int8", "nf4", fp32),
    ):
        config = ModelConfig(device="cpu", precision=given, encoder_precision=own)
        assert compute_of(config).encoder_dtype == wanted
