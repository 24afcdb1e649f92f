"""Who may import whom, and what `import itm_fast` may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import itm_fast

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(itm_fast.__file__).parent
# layer -> what of itm_fast it may import; the arrow of the design, downwards only
ALLOWED = {
    "cli": {"cli", "evaluation", "training", "models", "data", "testing", "nn", "ops", "packing"},
    "training": {"training", "evaluation", "models", "data", "nn", "ops", "packing"},
    "evaluation": {"evaluation", "data", "nn", "ops", "packing"},
    "models": {"models", "evaluation", "data", "nn", "ops", "packing"},
    "data": {"data"},
    "nn": {"nn", "ops", "packing"},
    "testing": {"testing", "ops", "packing"},
    "ops": {"ops", "packing", "kernels"},
    "packing": set(),
    "kernels": {"kernels", "packing"},
}
EVERYWHERE = {"", "_backends", "_checks", "_native", "_triton", "_workspace"}
EVERYWHERE |= {"_files", "_lazy", "_lock", "_names", "_public"}


def modules():
    for path in sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]):
        top = path.relative_to(PACKAGE).parts[0] if PACKAGE in path.parents else "kernels"
        yield path, top.removesuffix(".py")


def imported(path, package):
    """Modules of itm_fast that a file imports, as dotted names without `itm_fast.`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name.removeprefix("itm_fast.") for a in node.names if a.name.startswith("itm_fast."))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = [*base, *(node.module.split(".") if node.module else ())]
            if node.level == 0 and name[0] != "itm_fast":
                continue
            name = name[1:]
            if name:
                yield ".".join(name)
            else:
                yield from (a.name for a in node.names)


@pytest.mark.parametrize("path,top", [pytest.param(p, t, id=str(p.name)) for p, t in modules() if t in ALLOWED])
def test_imports_point_downwards(path, top):
    root = PACKAGE if PACKAGE in path.parents else ROOT
    package = ("itm_fast", *path.relative_to(root).parent.parts)
    for name in imported(path, package):
        layer = name.split(".")[0]
        known = (PACKAGE / layer).exists() or (PACKAGE / f"{layer}.py").exists()
        assert not known or layer in ALLOWED[top] | EVERYWHERE, f"{path.name} ({top}) imports {name}"


def test_every_layer_is_under_the_rule():
    layers = {t for _, t in modules()}
    assert layers <= set(ALLOWED) | EVERYWHERE | {"__init__", "__main__"}


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_importing_the_package_needs_torch_alone():
    heavy = ["h5py", "nltk", "tqdm", "PIL", "eccv_caption", "triton", "matplotlib"]
    code = (
        "import sys, torch, torch._dynamo\n"
        "before = set(sys.modules)\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {heavy}: raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import itm_fast, itm_fast.models.scan, itm_fast.models.sgraf\n"
        f"print(sorted(set({heavy}) & (set(sys.modules) - before)))"
    )
    assert run(code).strip() == "[]"


def test_parts_of_the_package_are_attributes_loaded_when_first_used():
    code = (
        "import sys, itm_fast\n"
        "parts = ['data', 'evaluation', 'models', 'nn', 'training']\n"
        "print([part for part in parts if f'itm_fast.{part}' in sys.modules], set(parts) <= set(dir(itm_fast)))\n"
        "print(*(getattr(itm_fast, part).__name__ for part in parts))\n"
        "print(itm_fast.evaluation.metrics.__name__, hasattr(itm_fast, 'evaluations'))\n"
    )
    assert run(code).splitlines() == [
        "[] True",
        "itm_fast.data itm_fast.evaluation itm_fast.models itm_fast.nn itm_fast.training",
        "metrics False",
    ]
    assert all(f"itm_fast.{part} " in itm_fast.__doc__ for part in ("data", "evaluation", "models", "nn", "training"))


def test_top_level_kernels_is_refused():
    # `kernels` is also the name of a package on PyPI; ours answers to itm_fast.kernels only.
    code = (
        "import importlib.util, itm_fast.kernels\n"
        "spec = importlib.util.spec_from_file_location('kernels', itm_fast.kernels.__file__)\n"
        "try: spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "except ImportError as e: print(e)"
    )
    assert "import itm_fast.kernels, not kernels" in run(code)
