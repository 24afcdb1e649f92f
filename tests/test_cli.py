"""The dispatcher and the doctor: exit codes, one sentence per error, laziness, what the report says."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

import itm_fast
from itm_fast import _backends, _native, cli
from itm_fast.cli import COMMANDS, doctor, main
from itm_fast.ops import _examples as examples
from itm_fast.ops._declare import DECLARED


def _command(monkeypatch, run):
    """Put a command that only does `run` in the place of `demo`."""
    module = types.ModuleType("itm_fast.cli.demo")
    module.HELP = "A command of the tests."
    module.add_arguments = lambda parser: parser.add_argument("--number", type=int)
    module.run = run
    monkeypatch.setitem(sys.modules, "itm_fast.cli.demo", module)


def _raising(error):
    def run(args):
        raise error

    return run


def test_help_and_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(f"\n    {name} " in text for name in COMMANDS)
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"itm-fast {itm_fast.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    module = importlib.import_module(f"itm_fast.cli.{name}")
    assert module.HELP.splitlines()[0] in text


@pytest.mark.parametrize("code", [0, 1])
def test_the_command_decides_the_exit_code(monkeypatch, code):
    seen = []
    _command(monkeypatch, lambda args: seen.append(args.number) or code)
    assert main(["demo", "--number", "3"]) == code
    assert seen == [3]


@pytest.mark.parametrize(
    "error, sentence",
    [
        (ValueError("margin must be positive"), "margin must be positive"),
        (TypeError("score must be floating point"), "score must be floating point"),
        (NotImplementedError("similarity_graph cannot run on cpu"), "similarity_graph cannot run on cpu"),
        (OSError("disk trouble"), "disk trouble"),
        (FileNotFoundError(2, "No such file or directory", "a/b.h5"), "a/b.h5: No such file or directory"),
        (ImportError("install the extra itm-fast[eccv]"), "install the extra itm-fast[eccv]"),
        (
            ModuleNotFoundError("No module named 'h5py'", name="h5py"),
            "this needs the Python package 'h5py', which is not installed; `pip install` it",
        ),
        (ValueError(), "ValueError without a message"),
        (MemoryError(), "out of memory; use a smaller batch size or memory budget (no details)"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate"),
            "out of memory; use a smaller batch size or memory budget (CUDA out of memory. Tried)",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "out of memory; use a smaller batch size or memory budget "
            "([enforce fail] DefaultCPUAllocator: can't allocate memory: you tried)",
        ),
    ],
)
def test_errors_that_users_can_mend_are_one_sentence(monkeypatch, capsys, error, sentence):
    _command(monkeypatch, _raising(error))
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == f"itm-fast demo: {sentence}\n"
    monkeypatch.setenv("ITM_FAST_DEBUG", "1")
    assert main(["demo"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_file_that_is_missing_is_named_with_its_option(tmp_path, capsys):
    missing = str(tmp_path / "saf.pth.tar")
    assert main(["evaluate", "--checkpoint", missing, "--data", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith(f"--checkpoint {missing}: No such file or directory\n")


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    _command(monkeypatch, _raising(KeyError("bug")))
    with pytest.raises(KeyError):
        main(["demo"])


@pytest.mark.parametrize(
    "error, sentence",
    [(KeyboardInterrupt(), "interrupted"), (KeyboardInterrupt("step 3 is kept; resume"), "step 3 is kept; resume")],
)
def test_interruption(monkeypatch, capsys, error, sentence):
    _command(monkeypatch, _raising(error))
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == f"itm-fast demo: {sentence}\n"


def test_a_command_whose_module_does_not_import(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "itm_fast.cli.demo", None)
    assert main(["demo"]) == 2
    assert "itm_fast.cli.demo" in capsys.readouterr().err


def _program(*words, **variables):
    environment = {**os.environ, "PYTHONPATH": str(Path(itm_fast.__file__).parents[1]), **variables}
    return subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def test_help_imports_no_command():
    code = """if True:
        import sys
        from itm_fast.cli import main
        try:
            main(["--help"])
        except SystemExit:
            pass
        print([name for name in sys.modules if name.startswith("itm_fast.cli.") and name != "itm_fast.cli._parser"])
    """
    assert _program("-c", code).stdout.splitlines()[-1] == "[]"


def test_warnings_are_one_line_each():
    code = """if True:
        import sys, types, warnings
        demo = types.ModuleType("itm_fast.cli.demo")
        demo.HELP, demo.add_arguments = "", lambda parser: None
        demo.run = lambda args: warnings.warn("the last caption is empty") or 0
        sys.modules["itm_fast.cli.demo"] = demo
        from itm_fast.cli import main
        sys.argv = ["itm-fast", "demo"]
        sys.exit(main())
    """
    found = _program("-c", code)
    assert (found.returncode, found.stderr) == (0, "itm-fast: the last caption is empty\n")


@pytest.mark.slow
def test_doctor_works_where_a_package_is_broken(tmp_path):
    (tmp_path / "nltk.py").write_text("raise RuntimeError('built for another Python')")
    root = Path(itm_fast.__file__).parents[1]
    found = _program("-m", "itm_fast", "doctor", PYTHONPATH=os.pathsep.join([str(tmp_path), str(root)]))
    assert found.returncode == 1, found.stderr
    assert "does not import: RuntimeError: built for another Python" in found.stdout
    assert "Something is broken" in found.stdout
    assert "similarity_graph torch cpu" in found.stdout


@pytest.mark.slow
def test_python_m_and_a_reader_that_goes_away():
    environment = {**os.environ, "PYTHONPATH": str(Path(itm_fast.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-m", "itm_fast", "doctor"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=600) == 1
    assert error == ""


def test_doctor_reports(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["itm-fast"] == itm_fast.__version__
    assert report["packages"]["numpy"] == {"version": importlib.metadata.version("numpy"), "problem": None}
    assert set(report["backends"]) == set(report["devices"]) == set(report["operations"]["similarity_graph"]["auto"])
    for device, reasons in report["backends"].items():
        assert reasons == {name: itm_fast.why_not(name, device) for name in _backends.NAMES}
    for op, offered in _backends.OFFERS.items():
        assert report["operations"][op]["offered"] == list(offered)
        assert report["operations"][op]["auto"]["cpu"] == _backends.resolve(op, None, torch.device("cpu"))
    checked = {(check["operation"], check["backend"]) for check in report["checks"] if check["device"] == "cpu"}
    assert {(op, "torch") for op in _backends.OFFERS} <= checked
    assert report["devices"]["cpu"]["memory_gib"] > 0
    assert report["native"] == {
        "why not": None,
        "level": _native.outcome().level,
        "compiler": _native.outcome().compiler,
        "library": str(_native.outcome().path),
        "cache folder": str(_native.cache_dir()),
        "bfloat16 products": doctor._bfloat16(),
    }
    assert report["cuda"] == doctor._cuda_kernels()


def test_doctor_prints_what_the_kernels_were_compiled_for(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"  compiled for  {_native.outcome().level}\n" in text
    assert f"  library       {_native.cache_dir()}" in text
    for name, value in doctor._cuda_rows(doctor._cuda_kernels()).items():
        assert re.search(rf"^  {re.escape(name)} +{re.escape(value)}$", text, re.MULTILINE)


def test_doctor_says_why_the_kernels_do_not_run(capsys, monkeypatch):
    monkeypatch.setattr(_native, "_outcome", "no C++ compiler on PATH; install g++")
    monkeypatch.setattr(_backends, "_told", set())
    monkeypatch.setitem(_backends.OFFERS, "similarity_graph", ("cpu", "torch", "reference"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "  cannot run    no C++ compiler on PATH; install g++\n" in text
    assert "  cpu        no C++ compiler on PATH; install g++\n" in text
    assert re.search(r" similarity_graph +torch  \(offers cpu, torch, reference\)", text)


def test_doctor_prints_the_same_as_text(capsys, monkeypatch):
    monkeypatch.setenv("ITM_FAST_BACKEND", "reference")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for wanted in (torch.__version__, itm_fast.why_not("cuda", "cpu"), "All is well."):
        assert wanted in text
    assert re.search(r"ITM_FAST_BACKEND +reference", text)
    assert re.search(r" similarity_filter +reference  \(offers", text)


def test_doctor_names_a_backend_setting_that_cannot_run(capsys, monkeypatch):
    monkeypatch.setenv("ITM_FAST_BACKEND", "fastest")
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "no backend is called 'fastest'" in report["operations"]["similarity_graph"]["auto"]["cpu"]


def test_doctor_looks_at_every_package_that_is_required():
    project = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if not project.is_file():
        pytest.skip("needs a checkout")
    (line,) = re.findall(r"^dependencies = (\[.*\])$", project.read_text(), re.MULTILINE)
    required = {re.match(r"[\w-]+", name)[0] for name in ast.literal_eval(line)}
    assert set(doctor._REQUIRED) == required - {"torch"}


def test_doctor_knows_an_example_of_every_operation():
    assert all(examples.kinds(op) for op in _backends.OFFERS)


FAULTS = "value", "gradient", "crash"
# One operation with every fault, and one of several results: each run checks all operations, of which the test above
# knows an example, and tests/test_accuracy.py that every mistake in it is seen.
BROKEN = {("similarity_graph", fault) for fault in FAULTS} | {("similarity_nodes", "value")}


@pytest.mark.slow
@pytest.mark.parametrize("op, fault", sorted(BROKEN))
def test_doctor_finds_a_broken_operation(op, fault, capsys, monkeypatch):
    real = getattr(itm_fast, op)

    @functools.wraps(real)
    def broken(*arguments, backend, **options):
        result = real(*arguments, backend=backend, **options)
        if backend == "reference":
            return result
        if fault == "crash":
            raise RuntimeError("illegal instruction")
        first, *rest = result if isinstance(result, tuple) else (result,)
        first = first * 1.001 if fault == "value" else first + 0.01 * (first - first.detach())
        return (first, *rest) if rest else first

    monkeypatch.setattr(DECLARED[op], "function", broken)
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    failed = {check["operation"]: check["problem"] for check in report["checks"] if not check["ok"]}
    assert list(failed) == [op]
    assert ("illegal instruction" if fault == "crash" else "error") in failed[op]


def test_doctor_reports_cuda_devices(monkeypatch):
    properties = types.SimpleNamespace(name="NVIDIA Test", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10 << 30, 80 << 30))
    found = doctor._devices()["cuda:0"]
    assert found == {"name": "NVIDIA Test", "memory_gib": 80.0, "free_gib": 10.0, "compute_capability": "9.0"}
    assert doctor._device_line(found) == "NVIDIA Test, 80.0 GiB (10.0 free), compute capability 9.0"


def test_commands_are_what_the_program_lists():
    modules = {path.stem for path in Path(cli.__file__).parent.glob("[!_]*.py")}
    assert set(COMMANDS) == modules
