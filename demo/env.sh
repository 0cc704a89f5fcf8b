# Sourced by the scripts here and in tests/: makes .venv beside the README once, and again when requirements.txt changes.
# In: root, the repository. PYTHON chooses the interpreter (3.11 or newer). Out: python, the environment's own.

setup_environment() {
    interpreter=${PYTHON:-python3}
    if ! command -v "$interpreter" >/dev/null 2>&1; then
        echo "error: PYTHON=$interpreter: no such interpreter; give one of Python 3.11 or newer, as in PYTHON=python3.12" >&2
        return 2
    fi
    if ! "$interpreter" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: $interpreter is $("$interpreter" --version 2>&1), expected Python 3.11 or newer;" \
            "choose another with PYTHON=, as in PYTHON=python3.12" >&2
        return 2
    fi
    python=$root/.venv/bin/python
    wanted="$("$interpreter" --version 2>&1) $(cksum <"$root/requirements.txt") $(cksum <"$root/pyproject.toml")"
    if [ -x "$python" ] && [ "$(cat "$root/.venv/installed" 2>/dev/null)" = "$wanted" ]; then
        return 0
    fi
    echo "== making the environment $root/.venv with $("$interpreter" --version 2>&1) (a few minutes, once)"
    "$interpreter" -m venv --clear "$root/.venv"
    (cd "$root" && "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt)
    # torchaudio's wheel links CUDA; beside a CPU build of torch its compiled part cannot load, and transformers would
    # fail with it. Its Python part, all that is used here, needs no compiled one.
    "$python" - <<'PYTHON_END'
import importlib.util
import pathlib
import torch

if torch.version.cuda is None:
    folder = pathlib.Path(importlib.util.find_spec("torchaudio").origin).parent / "lib"
    for library in folder.glob("_torchaudio*.so"):
        library.unlink()
PYTHON_END
    printf '%s' "$wanted" >"$root/.venv/installed"
}
