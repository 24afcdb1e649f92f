"""`pdoc itm_fast` renders the public names of every part without a warning."""

from __future__ import annotations

import subprocess
import sys

import pytest

import itm_fast

pytestmark = pytest.mark.slow


def test_pdoc_renders_every_part_without_a_warning(tmp_path):
    pytest.importorskip("pdoc")
    command = [sys.executable, "-m", "pdoc", "itm_fast", "-o", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert {page.stem for page in (tmp_path / "itm_fast").glob("*.html")} == set(itm_fast._PARTS)
    assert 'id="cross_attention_score"' in (tmp_path / "itm_fast.html").read_text()
    assert 'id="Metrics"' in (tmp_path / "itm_fast" / "evaluation.html").read_text()
