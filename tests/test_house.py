"""The house rules that a machine can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "rwkv_speech"

# From the ground up: a module may import only modules that stand before it.
ORDER = """
    errors files ops ops.build ops.native ops.wkv6_ref ops.wkv6_chunked ops.wkv6 ops.mix audio text metrics losses optim
    splice adapter encoder_attention encoder tokenizer base_weights rwkv6 checkpoint decoding tiny speech_lm selection
    data data.utterance data.mixture data.manifest data.manifest_reader data.manifest_writer data.manifest_table
    data.sources data.huggingface data.tar_shards data.augment data.feature_cache data.dataset data.plan data.samplers
    data.loader data.feature_fill data.streaming data.synth evaluation config plan_sizes plan_memory plan_compute
    plan run_record report_charts report average export resume training_data training_plan lightning_module
    lightning_callbacks lightning_run tiny.corpus tiny.voices tiny.augment tiny.speech_pool tiny.phone_prompts
    tiny.make_corpus tiny.pretrain_encoder tiny.pretrain_lm
""".split()


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(path: Path) -> set[str]:
    """The package's own modules that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    own = {name.removeprefix("rwkv_speech.") for name in names if name.startswith("rwkv_speech.")}
    return own & set(ORDER)


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_module_has_its_place():
    assert sorted(map(name_of, MODULES)) == sorted(ORDER)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path: Path):
    mine = ORDER.index(name_of(path))
    # Sources know of each other; those of the hub and of tar shards are imported when they are asked for.
    allowed = {"data.huggingface", "data.tar_shards"} if name_of(path) == "data.sources" else set()
    assert {name for name in imported(path) if ORDER.index(name) >= mine} <= allowed


def test_only_the_lightning_files_import_it():
    users = [path.name for path in PACKAGE.rglob("*.py") if "import pytorch_lightning" in path.read_text()]
    assert sorted(users) == ["lightning_callbacks.py", "lightning_module.py", "lightning_run.py"]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_environment_variable_decides(path: Path):
    assert "environ" not in path.read_text(encoding="utf-8")


def test_import_is_light():
    code = "import sys, rwkv_speech; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names():
    import rwkv_speech

    assert all(callable(getattr(rwkv_speech, name)) for name in rwkv_speech.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = rwkv_speech.nothing


def test_top_level_is_the_agreed_one():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    agreed = {
        "README.md", "requirements.txt", "train.py", "eval.py", "predict.py", "src", "cuda", "demo", "output",
        "pyproject.toml", "LICENSE", "CHANGELOG.md", "tests", "benchmarks", ".ci", ".gitignore",
    }  # fmt: skip
    assert {name.split("/")[0] for name in tracked if name} <= agreed
