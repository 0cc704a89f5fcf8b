"""What `import rwkv_speech` does, and does not."""

import os
import subprocess
import sys

import pytest

import rwkv_speech


def after_import(expression: str, **variables: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    program = f"import os, sys, rwkv_speech; print(({expression}))"
    done = subprocess.run(
        [sys.executable, "-c", program], env=clean | variables, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_public_names_are_listed_and_there():
    assert [name for name in dir(rwkv_speech) if not name.startswith("__")] == sorted(rwkv_speech.__all__)
    assert all(callable(getattr(rwkv_speech, name)) for name in rwkv_speech.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = rwkv_speech.nothing


def test_import_is_light_and_bounds_openmp_s_spinning_unless_the_user_says_otherwise():
    spin = "os.environ.get('GOMP_SPINCOUNT')"
    assert after_import(f"('torch' in sys.modules, {spin})") in ("(False, '100')", "(False, '5000')")
    assert after_import(spin, GOMP_SPINCOUNT="7") == "7"
    assert after_import(spin, OMP_WAIT_POLICY="active") == "None"


def test_threads_spin_where_cores_are_idle():
    assert [rwkv_speech._spin_count(f"0.20 0.10 0.05 {n}/150 99\n", cores=2) for n in (1, 2, 3, 6)] == [
        "5000", "5000", "100", "100",
    ]  # fmt: skip
