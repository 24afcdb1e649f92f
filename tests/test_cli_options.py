"""Command lines with mistakes: every one in a sentence, with the nearest name, before torch is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from itm_fast.cli import COMMANDS, build_parser, main
from itm_fast.models._catalogue import CATALOGUE
from itm_fast.models._options import ENCODERS, TRAINING


def refused(capsys, *words: str) -> list[str]:
    """The lines on standard error of a command line that argparse refuses."""
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


GIVEN = ["--checkpoint", "x", "--data", "x", "--image", "0"]


@pytest.mark.parametrize(
    "words, sentence",
    [
        ([], "itm-fast: COMMAND must be given; `itm-fast --help` explains it"),
        (["trian"], "itm-fast: there is no command 'trian'; did you mean train?"),
        (["tidy"], "itm-fast: there is no command 'tidy'; the commands are evaluate, metrics, compare,"),
        (["--verbose", "doctor"], "itm-fast: there is no option --verbose; `itm-fast --help` lists them"),
        (["doctor", "--jso"], "itm-fast doctor: there is no option --jso; did you mean --json?"),
        (["attend", *GIVEN, "--caption", "x"], "no option --caption; give CAPTION alone, without an option's name"),
        (["evaluate", "--thread", "4"], "there is no option --thread; `itm-fast evaluate --help` lists them"),
        (["evaluate", "--no-progress=yes"], "itm-fast evaluate: --no-progress takes no value, got 'yes'"),
        (["train", "--output", "x", "--no-bi-gru=1"], "itm-fast train: --no-bi-gru takes no value, got '1'"),
        (["doctor", "--json="], "itm-fast doctor: --json takes no value, got ''"),
        (["doctor", "--qqq", "5"], "itm-fast doctor: there is no option --qqq; `itm-fast doctor --help` lists them"),
        (["doctor", "now"], "itm-fast doctor: 'now' belongs to no option"),
        (["evaluate", "--chekpoint", "x"], "there is no option --chekpoint; did you mean --checkpoint?"),
        (["evaluate", "--Data=x"], "itm-fast evaluate: there is no option --Data; did you mean --data?"),
        (["evaluate", "--limit_captions", "5"], "there is no option --limit_captions; did you mean --limit-captions?"),
        (["evaluate", "--ties", "pesimistic"], "got 'pesimistic'; did you mean pessimistic?"),
        (["evaluate", "--backend", "fast"], "--backend must be one of auto, triton, cuda, cpu, torch, reference, got"),
        (["evaluate", "--memory-gb", "all"], "itm-fast evaluate: --memory-gb wants a number, got 'all'"),
        (["demo", "--seed", "x"], "itm-fast demo: --seed wants a whole number, got 'x'"),
        (["demo", "--model", "saff"], "--model must be one of sgr, saf, scan, all, got 'saff'; did you mean saf?"),
        (["convert", "a"], "itm-fast convert: DST must be given; `itm-fast convert --help` explains it"),
        (["convert", "a", "b", "c", "d"], "itm-fast convert: 'c' 'd' belongs to no option"),
        (["train"], "itm-fast train: --output must be given; `itm-fast train --help` explains it"),
        (["train", "--output"], "itm-fast train: --output: expected one argument"),
        (["train", "--output", "x", "--model", "sgraf"], "train sgr and saf, each in a folder of its own"),
        (["train", "--output", "x", "--model", "SGRAF"], "train sgr and saf, each in a folder of its own"),
        (["train", "--output", "x", "--model", "SGR"], "got 'SGR'; did you mean sgr?"),
        (["train", "--output", "x", "--max-steps", "0"], "itm-fast train: --max-steps must be at least 1, got 0"),
        (["train", "--output", "x", "--min-count", "-1"], "itm-fast train: --min-count must be at least 1, got -1"),
        (["train", "--output", "x", "--limit-dev-captions", "5k"], "--limit-dev-captions wants a whole number"),
        (["train", "--output", "x", "--granularities", "1", "two"], "--granularities wants a whole number, got 'two'"),
        (["train", "--output", "x", "--backend", "cpuu"], "got 'cpuu'; did you mean cpu?"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(capsys, words, sentence):
    (line,) = refused(capsys, *words)
    assert sentence in line
    assert line.startswith(f"itm-fast {words[0]}: " if words and words[0] in COMMANDS else "itm-fast: ")


def test_all_mistakes_are_named_at_once(capsys):
    words = ["train", "--outptu", "x", "--epochs", "ten", "--modle", "sgf", "--lr=fast", "--wrold", "3", "--seed", "1"]
    assert refused(capsys, *words) == [
        "itm-fast train: there is no option --outptu; did you mean --output?",
        "itm-fast train: there is no option --modle; did you mean --model?",
        "itm-fast train: there is no option --wrold; `itm-fast train --help` lists them",
        "itm-fast train: --epochs wants a whole number, got 'ten'",
        f"itm-fast train: --model must be one of {', '.join(CATALOGUE)}, got 'sgf'; did you mean sgr?",
        "itm-fast train: --lr wants a number, got 'fast'",
    ]


def test_a_misspelt_switch_with_a_value_is_told_in_plain_words(capsys):
    assert refused(capsys, "evaluate", "--data", "x", "--checkpoint", "y", "--no-progres=yes") == [
        "itm-fast evaluate: there is no option --no-progres; did you mean --no-progress?",
        "itm-fast evaluate: --no-progress takes no value, got 'yes'",
    ]


def test_what_looks_like_an_option_and_is_none():
    demo = build_parser("demo").parse_args(["demo", "--images", "-5", "--queries", "-", "-.5", "a - b"])
    assert (demo.images, demo.queries) == (-5, ["-", "-.5", "a - b"])
    convert = build_parser("convert").parse_args(["convert", "--", "--source", "-d"])
    assert (convert.source, convert.destination) == ("--source", "-d")


@pytest.mark.parametrize(
    "more, sentence",
    [
        ("--lr nan", "--lr must be a finite number, got nan"),
        ("--margin inf", "--margin must be a finite number, got inf"),
        ("--sim-dim 0", "--sim-dim must be at least 1, got 0"),
        ("--epochs 0", "--epochs must be at least 1, got 0"),
        ("--num-layers 1000000", "--num-layers must be at most 100, got 1000000"),
        ("--sgr-steps 1000000", "--sgr-steps must be at most 100, got 1000000"),
        ("--embed-size 99999999999999999999", "--embed-size must be at most 9223372036854775807, got"),
        ("--seed 99999999999999999999", "--seed must be at most 9223372036854775807, got"),
        ("--batch-size 1", "--batch-size must be at least 2, got 1"),
        ("--batch-size -1", "--batch-size must be at least 2, got -1"),
        ("--lambda-softmax 9 --levels 1 1 1", "sgr has no option --lambda-softmax, --levels; its options are --b"),
        ("--direction i2t", "--direction is for --model scan or rcar or shan"),
        ("--vocab v.json --min-count 3", "--min-count is for a vocabulary built here"),
    ],
)  # fmt: skip
def test_values_and_options_of_other_models_are_refused_by_their_flags(capsys, tmp_path, more, sentence):
    assert main(["train", "--model", "sgr", "--data", "nowhere", "--output", f"{tmp_path}/x", *more.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"itm-fast train: {sentence}")
    assert "sgr_step" not in line


def test_every_published_option_has_its_flag():
    found = set()
    for known in (TRAINING, ENCODERS, *(row.options for row in CATALOGUE.values())):
        for name, option in known.items():
            if option.help is None:
                continue
            values = option.default if isinstance(option.default, list) else [option.default]
            given = [] if isinstance(option.default, bool) else [str(value) for value in values]
            flag = f"--{(option.flag or name).replace('_', '-')}"
            parsed = build_parser("train").parse_args(["train", "--output", "x", flag, *given])
            wanted = "None" if option.default is None else True if not given else option.default
            assert getattr(parsed, name) == wanted, flag
            found.add(flag)
    assert len(found) == 54
    assert {"--lr", "--epochs", "--imgnorm", "--sgr-steps", "--levels", "--gate-sharing", "--word-vectors"} <= found


def test_nothing_heavy_is_imported_for_help_and_mistakes():
    code = """if True:
        import contextlib, io, sys
        from itm_fast.cli import COMMANDS, build_parser, main
        for command in (None, *COMMANDS):
            build_parser(command).format_help()
        wrong = [[], ["trian"], *([name, "--qqq"] for name in COMMANDS)]
        wrong += [["--help"], *([name, "--help"] for name in COMMANDS)]
        wrong += [["train", "--output", "x", "--model", "sgr", "--data", "y", *more.split()]
                  for more in ("--lr nan", "--agg-func Sum", "--direction t2i", "--vocab v --min-count 2")]
        wrong += [["train", "--output", "x"], ["evaluate"], ["evaluate", "--resume", "--data=x", "--checkpoint=y"]]
        for words in wrong:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                with contextlib.suppress(SystemExit):
                    assert main(words) == 2, words
        print(sorted({"torch", "h5py", "nltk", "PIL", "scipy"} & set(sys.modules)))
    """
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert found.stdout == "[]\n"


def test_names_are_imported_when_they_are_asked_for():
    code = """if True:
        import sys
        import itm_fast
        assert "torch" not in sys.modules
        from itm_fast import training, evaluation
        assert "torch" not in sys.modules
        for package in (training, evaluation, itm_fast):
            for name in ("nothing", "__wrapped__"):
                assert not hasattr(package, name)
        assert callable(itm_fast.pack) and "torch" in sys.modules
        import torch
        assert torch.ops.itm_fast.hardest_negative_loss
        for package in (training, evaluation, itm_fast):
            for name in package.__all__:
                assert getattr(package, name) is not None
        from itm_fast import *
        assert cross_attention_score is itm_fast.ops.cross_attention_score
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_ops_are_registered_at_once_where_torch_is_there():
    code = "import torch, itm_fast; assert torch.ops.itm_fast.hardest_negative_loss"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
