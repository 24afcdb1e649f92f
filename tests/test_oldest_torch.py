"""A part of the suite with the oldest torch that is supported, in an environment that ITM_FAST_OLDEST_PYTHON names.

An environment with torch 2.6 is 2.9 GB to download, so .ci/run makes none:

    python -m venv oldest && ITM_FAST_LEVELS=none oldest/bin/pip install torch==2.6.0 . pytest hypothesis
    oldest/bin/pip uninstall --yes itm-fast
    ITM_FAST_OLDEST_PYTHON=$PWD/oldest/bin/python pytest tests/test_oldest_torch.py tests/test_packaging.py
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = os.environ.get("ITM_FAST_OLDEST_PYTHON", "")
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="needs ITM_FAST_OLDEST_PYTHON, a Python with the oldest torch"),
    pytest.mark.slow,
]
# Where torch's own behaviour matters: files, random states, operators, autograd; what users meet first.
FILES = (
    "checkpoint", "checkpoint_forms", "model_load", "cross_attention_score", "training_resume", "features", "data",
    "attention_weights", "gallery",
)  # fmt: skip


def run(*words):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([PYTHON, *words], capture_output=True, text=True, check=False, cwd=ROOT, env=environment)


def test_it_is_the_oldest_torch():
    (oldest,) = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    done = run("-c", "import torch; print(torch.__version__)")
    assert done.stdout.startswith(f"{oldest}."), done.stdout + done.stderr


@pytest.mark.parametrize("name", FILES)
def test_a_part_of_the_suite(name):
    done = run("-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", f"tests/test_{name}.py")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert " passed" in done.stdout


def test_the_demo_data_are_scored():
    code = """
import itm_fast
from itm_fast.data.openclipart import CHECKPOINTS, FOLDER
loaded = itm_fast.models.load(CHECKPOINTS["saf"])
features = itm_fast.data.open_split(FOLDER, "test").features[:10]
print(itm_fast.evaluation.score(loaded.model, features, ["a red apple"], loaded.vocab).shape)
"""
    done = run("-c", code)
    assert done.stdout == "(10, 1)\n", done.stdout + done.stderr
