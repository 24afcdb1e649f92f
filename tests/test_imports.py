"""Who may import whom, and what `import itm_fast` may cost."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import itm_fast

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(itm_fast.__file__).parent
GUIDE = ROOT / ".github" / "CONTRIBUTING.md"


def drawn():
    """The arrows of the contributors' guide: part -> what of itm_fast it may import."""
    block = re.search(r"```arrows\n(.*?)```", GUIDE.read_text(), re.DOTALL)[1] if GUIDE.is_file() else ""
    rows = (line.split(" -> ") for line in block.splitlines())
    return {part: set(others.split()) for parts, others in rows for part in parts.split()}


ARROWS = drawn()


def modules():
    for path in sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]):
        top = path.relative_to(PACKAGE).parts[0] if PACKAGE in path.parents else "kernels"
        yield path, top.removesuffix(".py")


def imported(path, package, within=()):
    """Modules of itm_fast that a file imports when it runs, as dotted names without `itm_fast.`.

    Args:
        path: the file.
        package: the names of its package, "itm_fast" first.
        within: names of all modules, where a module named in `from package import module` is to be told from a name.
    """
    tree = ast.parse(path.read_text())
    for test in [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]:
        test.body = [] if ast.dump(test.test).startswith("Name") else test.body
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name.removeprefix("itm_fast.") for a in node.names if a.name.startswith("itm_fast."))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = [*base, *(node.module.split(".") if node.module else ())]
            if node.level == 0 and name[0] != "itm_fast":
                continue
            name = name[1:]
            if name:
                module = ".".join(name)
                inner = [f"{module}.{a.name}" for a in node.names if f"itm_fast.{module}.{a.name}" in within]
                yield from inner or [module]
            else:
                yield from (a.name for a in node.names)


@functools.cache
def arrows():
    """Every arrow between two parts of the package, and a file that has it; imports inside functions too."""
    found = {}
    for path, top in modules():
        root = PACKAGE if PACKAGE in path.parents else ROOT
        package = ("itm_fast", *path.relative_to(root).parent.parts)
        for name in imported(path, package):
            part = name.split(".")[0]
            if part != top and ((PACKAGE / part).exists() or (PACKAGE / f"{part}.py").exists()):
                found.setdefault((top, part), path.name)
    return found


needs_guide = pytest.mark.skipif(not ARROWS, reason="needs a checkout")


@needs_guide
@pytest.mark.parametrize("part", sorted({top for _, top in modules()} - {"__init__", "__main__"}))
def test_a_part_imports_what_the_guide_draws_and_all_of_that(part):
    found = {other: file for (top, other), file in arrows().items() if top == part}
    base = set() if part.startswith("_") else ARROWS["all"]
    allowed = ARROWS.get(part, set())
    assert not {other: file for other, file in found.items() if other not in allowed | base}
    assert allowed <= set(found), "the guide draws arrows that nothing uses"


@needs_guide
def test_the_arrows_point_one_way():
    later = {part: set(others) for part, others in ARROWS.items() if part != "all"}
    while later:
        leaves = {part for part, others in later.items() if not others & set(later)}
        assert leaves, f"a circle among {sorted(later)}"
        later = {part: others for part, others in later.items() if part not in leaves}


def test_no_module_imports_itself_through_others():
    """Not by an import inside a function either, as those of one part may."""
    names = {}
    for path, _ in modules():
        root = PACKAGE if PACKAGE in path.parents else ROOT
        parts = ("itm_fast", *path.relative_to(root).with_suffix("").parts)
        names[".".join(parts).removesuffix(".__init__")] = path, parts[:-1]
    later = {}
    for name, (path, package) in names.items():
        known = (f"itm_fast.{other}" for other in imported(path, package, within=names))
        later[name] = {other for other in known if other in names and other != name}
    while later:
        leaves = {name for name, others in later.items() if not others & set(later)}
        assert leaves, f"a circle among {sorted(later)}"
        later = {name: others for name, others in later.items() if name not in leaves}


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_importing_the_package_and_its_models_needs_only_torch_and_einops():
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


@pytest.mark.slow
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


def test_einops_comes_with_the_models_and_not_with_the_ops():
    code = (
        "import sys, torch, itm_fast, itm_fast.ops, itm_fast.nn, itm_fast.evaluation, itm_fast.data\n"
        "from itm_fast.testing import inputs\n"
        "itm_fast.cross_attention_score(*inputs(2, [3, 2], 4, 8))\n"
        "print('einops' in sys.modules)\n"
        "import itm_fast.models.scan\n"
        "print('einops' in sys.modules)"
    )
    assert run(code).split() == ["False", "True"]
