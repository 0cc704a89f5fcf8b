"""The house rules that a machine can check."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "rwkv_speech"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")

# A room imports rooms of lower rank only; rooms of one rank never each other.
RANKS = [
    "errors files flags config media audio text tokenizer tiny",
    "devices tasks ops",
    "batch",
    "models data",
    "decoding planning synthetic checks",
    "scoring predict",
    "reports serving",
    "training",
    "__main__",
]
RANK = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms.split()}
# The ground floor's one order: all may raise errors, audio decodes media, the configuration is made of flags.
GROUND = {"errors", "media", "flags"}


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
    return own & set(map(name_of, MODULES)) - {name_of(path)}


def room(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path: Path):
    mine = room(name_of(path))
    others = {room(name) for name in imported(path)} - {mine} - GROUND
    assert {other for other in others if RANK[other] >= RANK[mine]} == set()


def test_no_circles():
    graph = {name_of(path): imported(path) for path in MODULES}
    # A package's own __init__ is imported with each of its modules; only what it imports itself counts.
    while free := {name for name, needs in graph.items() if not needs & set(graph)}:
        graph = {name: needs for name, needs in graph.items() if name not in free}
    assert graph == {}


@pytest.mark.parametrize(
    ("library", "home"),
    [
        ("pytorch_lightning", "training"),
        ("deepspeed", "training"),
        ("datasets", "data"),
        ("pyarrow", "data"),
        ("httpx2", "models"),
        ("matplotlib", "reports"),
        ("jinja2", "reports"),
        ("sacrebleu", "scoring"),
        ("fastapi", "serving"),
        ("starlette", "serving"),
        ("uvicorn", "serving"),
        ("pydantic", "serving"),
        ("prometheus_client", "serving"),
        ("gradio", "serving"),
    ],
)
def test_a_library_has_one_home(library: str, home: str):
    users = {
        room(name_of(path))
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        and library in {n.split(".")[0] for n in [getattr(node, "module", None) or "", *(a.name for a in node.names)]}
    }
    assert users == {home}


# Where the CUDA toolkit lies is told by its own variable, as by PATH.
ENVIRONMENT = {"ops.build": 'os.environ.get("CUDA_HOME")'}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_environment_variable_decides(path: Path):
    allowed = ENVIRONMENT.get(name_of(path), "")
    assert allowed in (text := path.read_text(encoding="utf-8"))
    assert "environ" not in (text.replace(allowed, "") if allowed else text)


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


def _records(path: Path) -> dict[str, list[str]]:
    """The fields of a file's dataclasses and named tuples."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            marks = {ast.unparse(x).split("(")[0] for x in (*node.decorator_list, *node.bases)}
            if marks & {"dataclass", "dataclasses.dataclass", "NamedTuple"}:
                fields = [
                    x.target.id for x in node.body if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name)
                ]
                found[node.name] = fields
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/results").glob("*.json")), ids=lambda path: path.name)
def test_a_result_names_no_folder_of_one_machine(path: Path):
    assert not re.search(r"(?<![^\s,=])/", json.loads(path.read_text()).get("command", ""))


def test_every_field_is_read():
    """A field that is filled and never read is a promise that nobody keeps."""
    code = [*MODULES, *ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    read = {
        node.attr
        for path in code
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    # Whole records that are written as they are.
    read |= {
        field
        for path in MODULES
        for name in ("Scores", "LogRow", "TaskRow", "Parts", "State", "Word", "Segment", "Transcript")
        for field in _records(path).get(name, [])
    }
    unread = {
        f"{name_of(path)}.{name}.{field}"
        for path in MODULES
        for name, fields in _records(path).items()
        for field in fields
        if field not in read
    }
    assert unread == set()


# Modules without a test file of their name, and where they are tested: with what they serve.
TESTED_IN = {
    "flags": "test_config.py",
    **dict.fromkeys(
        ("config.decoding", "config.forms", "config.model", "config.prediction", "config.serving", "config.training"),
        "test_config.py",
    ),
    "data.feature_fill": "data/test_feature_cache.py",
    "data.folder": "data/test_sources.py",
    **dict.fromkeys(("decoding.piece_text", "decoding.transcriber"), "decoding/test_transcribe.py"),
    **dict.fromkeys(("media.decoding", "media.ffmpeg", "media.headers", "media.opening"), "test_media.py"),
    "predict": "journeys/test_predict.py",
    "models.families": "models/test_base.py",
    "models.text_model": "models/test_speech_lm_files.py",
    "models.merge": "models/test_peft.py",
    "ops.build": "ops/test_native.py",
    **dict.fromkeys(("ops.chunks", "ops.wkv6_chunked", "ops.wkv6_ref"), "ops/test_wkv6.py"),
    **dict.fromkeys(("ops.wkv7_chunked", "ops.wkv7_ref"), "ops/test_wkv7.py"),
    "reports.render": "reports/test_page.py",
    "scoring.measure": "scoring/test_measures.py",
    **dict.fromkeys(
        "serving.answers serving.events serving.faults serving.form serving.metrics serving.worker".split(),
        "serving/test_server.py",
    ),
    **dict.fromkeys(("serving.chat_form", "serving.sessions"), "serving/test_chat.py"),
    **dict.fromkeys(("serving.page_view", "serving.page_work"), "serving/test_page.py"),
    "serving.hearing": "serving/test_realtime.py",
    "serving.realtime_form": "serving/test_realtime_client.py",
    **dict.fromkeys(
        "synthetic.lesson_batches synthetic.rwkv6_init synthetic.rwkv7_init synthetic.world_lessons".split(),
        "synthetic/test_pretrain_lm.py",
    ),
    **dict.fromkeys(("synthetic.grammar", "synthetic.lexicon"), "synthetic/test_world.py"),
    **dict.fromkeys(
        "synthetic.corpus synthetic.make_corpus synthetic.voices synthetic.rooms synthetic.speech_pool "
        "synthetic.pretrain_encoder".split(),
        "journeys/test_tiny.py",
    ),
    "training.callbacks": "training/test_run.py",
    "training.points": "training/test_resume.py",
    "training.progress": "training/test_run.py",
    "training.strategies": "training/test_deepspeed.py",
}


def test_every_module_has_tests_of_its_name_or_a_reason():
    tests = ROOT / "tests"
    named = {name_of(path) for path in MODULES if path.stem.strip("_") in ("init", "main")}
    named |= {
        name_of(path) for path in MODULES if (tests / path.relative_to(PACKAGE).with_name(f"test_{path.name}")).exists()
    }
    assert set(map(name_of, MODULES)) - named == set(TESTED_IN)
    assert all((tests / place).exists() for place in TESTED_IN.values())
