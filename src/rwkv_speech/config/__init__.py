"""Every flag of train.py, eval.py, predict.py and of verbs that have many: what it is for and what it may be."""

from rwkv_speech.config.decoding import DecodeFlags, EvalConfig
from rwkv_speech.config.forms import (
    ACCEPTED_FORMS,
    DATA_FORMS,
    FEATURE_DTYPES,
    KERNEL_FORMS,
    LABEL_MODES,
    LORA,
    NORMALIZERS,
    OUTPUT_FORMATS,
    PROMPT_FORMS,
    SCHEDULES,
    STATE_OFFSET,
    TASK_FORM,
    TEXT,
    encoder_layers,
    numbers,
    output_formats,
)
from rwkv_speech.config.model import ModelConfig
from rwkv_speech.config.prediction import AnswerConfig, PredictConfig
from rwkv_speech.config.serving import BoundFlags, LimitFlags, PageConfig, ServeConfig
from rwkv_speech.config.training import TrainConfig

__all__ = [
    "ACCEPTED_FORMS",
    "DATA_FORMS",
    "FEATURE_DTYPES",
    "KERNEL_FORMS",
    "LABEL_MODES",
    "LORA",
    "NORMALIZERS",
    "OUTPUT_FORMATS",
    "PROMPT_FORMS",
    "SCHEDULES",
    "STATE_OFFSET",
    "TASK_FORM",
    "TEXT",
    "AnswerConfig",
    "BoundFlags",
    "DecodeFlags",
    "EvalConfig",
    "LimitFlags",
    "ModelConfig",
    "PageConfig",
    "PredictConfig",
    "ServeConfig",
    "TrainConfig",
    "encoder_layers",
    "numbers",
    "output_formats",
]
