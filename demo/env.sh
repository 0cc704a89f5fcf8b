# Sourced by the scripts here and in tests/, which set root, the repository. setup_environment finds the environment
# $root/.venv or makes it, and sets python to its interpreter.
#   PYTHON=python3.12   makes it with this interpreter (3.11 or newer)
#   venv=rebuild        makes it again; otherwise only a broken one is, and changed requirements are installed into it
#   venv=none           uses PYTHON as it is and installs nothing

version_of() {
    "$1" -c 'import sys; print("Python %d.%d" % sys.version_info[:2])' 2>/dev/null || echo "no such interpreter"
}

has_module() {
    "$python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec(sys.argv[1]))' "$1" 2>/dev/null
}

# Ends a script that lacks a manifest: needs_manifests FOLDER train valid ...
needs_manifests() {
    folder=$1
    shift
    for part in "$@"; do
        if [ ! -f "$folder/$part.jsonl" ]; then
            echo "usage: $0 FOLDER: expected $part.jsonl in FOLDER (of the manifests $*);" \
                "'$folder/$part.jsonl' is not there" >&2
            exit 2
        fi
    done
}

# with_weights VERB [flags]: ends in `python -m rwkv_speech VERB` with the weights in proj_dir, and the variables device, wkv6,
# load_model, encoder, n_layer and n_embd, if they are set. Empty, the last four are as the checkpoint says; published files
# say nothing: they need load_model.
with_weights() {
    verb=$1
    shift
    setup_environment
    exec "$python" -m rwkv_speech "$verb" --load_model "${load_model-}" --encoder "${encoder-}" --proj_dir "$proj_dir" \
        --n_layer "${n_layer-}" --n_embd "${n_embd-}" --device "${device-auto}" --wkv6 "${wkv6-auto}" "$@"
}

# mend_torchaudio PYTHON: transformers imports torchaudio, whose compiled part loads only beside a torch built with the same
# CUDA. Its part in Python, all that is used here, needs no compiled one.
mend_torchaudio() {
    if ! "$1" -c 'import torchaudio' 2>/dev/null; then
        echo "== torchaudio's compiled part cannot load beside this torch: removed, its Python part serves"
        "$1" - <<'PYTHON_END'
import importlib.util
import pathlib

for folder in importlib.util.find_spec("torchaudio").submodule_search_locations:
    for library in pathlib.Path(folder).glob("lib/_torchaudio*.so"):
        library.unlink()
PYTHON_END
        "$1" -c 'import torchaudio'
    fi
}

setup_environment() {
    interpreter=${PYTHON:-python3}
    case ${venv:-auto} in
    auto | rebuild) python=$root/.venv/bin/python ;;
    none)
        python=$interpreter
        if has_module torch && has_module rwkv_speech; then return 0; fi
        echo "error: venv=none: $python ($(version_of "$python")) lacks what requirements.txt names;" \
            "install it there, or leave venv empty" >&2
        return 2
        ;;
    *)
        echo "error: venv=$venv, expected rebuild, none or nothing" >&2
        return 2
        ;;
    esac
    wanted="$root $(cat "$root/requirements.txt" "$root/pyproject.toml" | cksum)"
    if [ "${venv:-auto}" = auto ] && "$python" -c '' 2>/dev/null; then
        if [ -n "${PYTHON:-}" ] && [ "$(version_of "$PYTHON")" != "$(version_of "$python")" ]; then
            echo "note: $root/.venv is $(version_of "$python"); venv=rebuild makes it again with $PYTHON" >&2
        fi
        if [ "$(cat "$root/.venv/installed" 2>/dev/null)" = "$wanted" ]; then return 0; fi
    fi
    if [ "${venv:-auto}" = auto ] && "$python" -m pip --version >/dev/null 2>&1; then
        echo "== installing requirements.txt, which has changed, into $root/.venv"
    else
        if ! "$interpreter" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "error: PYTHON=$interpreter: found $(version_of "$interpreter")," \
                "expected Python 3.11 or newer, as in PYTHON=python3.12" >&2
            return 2
        fi
        echo "== making the environment $root/.venv with $(version_of "$interpreter") (a few minutes, once)"
        "$interpreter" -m venv --clear "$root/.venv"
    fi
    (cd "$root" && "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt)
    mend_torchaudio "$python"
    printf '%s' "$wanted" >"$root/.venv/installed"
}
