"""The catalogue of models: each of its rows is true, and what the project says of its models is what stands there."""

import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from itm_fast import models
from itm_fast.models import build, checkpoint, model_class
from itm_fast.models._catalogue import CATALOGUE, RECIPES
from itm_fast.models._options import COMMON
from itm_fast.models._recognised import recognised, title
from itm_fast.training import options

README = Path(__file__).resolve().parents[1] / "README.md"
SMALL = {"img_dim": 6, "embed_size": 16, "word_dim": 4}
over_models = pytest.mark.parametrize("row", CATALOGUE.values(), ids=CATALOGUE)


def small(row, **changes):
    return Namespace(**vars(options(row.name, **SMALL, **changes)), vocab_size=9, device="cpu")


@over_models
def test_a_row_names_the_class_and_the_options_that_it_reads(row):
    opt = small(row)
    model = build(opt)
    assert type(model) is row.model() is model_class(opt)
    assert getattr(models, type(model).__name__) is row.model()
    beside = {*COMMON, "vocab_size", row.mark[0]}
    directed = {row.direction} if row.direction else set()
    assert set(row.model().reads()) - beside - directed <= set(row.options)
    given = {row.mark[0], row.direction} - {""}
    assert set(row.options) & (set(COMMON) | given) == set()
    assert vars(opt).keys() == {*COMMON, *row.options, *given, "vocab_size", "device"}


@over_models
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_direction_of_a_row_is_built_and_recognised(row, recipe):
    for direction in row.directions or (None,):
        opt = Namespace(**vars(options(row.name, recipe=recipe, direction=direction, **SMALL)), vocab_size=9)
        assert recognised(opt) is row
        assert title(opt) == (f"{row.title} {direction}" if direction else row.title)
        build(opt)


@over_models
def test_the_texts_that_an_option_may_be_are_those_that_the_model_takes(row):
    for name, option in row.options.items():
        for choice in option.choices:
            build(small(row, **{name: choice}))
        if option.choices:
            with pytest.raises(ValueError, match="must be one of .*" + option.choices[-1]):
                build(small(row, **{name: "another"}))


def test_a_key_of_what_differs_is_a_recipe_a_direction_or_both():
    for row in CATALOGUE.values():
        both = {f"{recipe} {direction}" for recipe in RECIPES for direction in row.directions}
        assert set(row.differs) <= {*RECIPES, *row.directions, *both}
        for change in row.differs.values():
            assert set(change) <= {*COMMON, *row.options}


def test_a_list_of_a_run_is_its_own():
    options("hgan").granularities.append(32)
    assert options("hgan").granularities == [1, 4, 16]


def test_options_of_no_model_are_refused():
    with pytest.raises(ValueError, match="neither module_name"):
        build(Namespace())
    known = sorted(value for option, value in (row.mark for row in CATALOGUE.values()) if option == "system")
    assert {"DualEncoder", "HGAN", "SHAN", "TSHSR"} <= set(known)
    for odd in ("SCAN", ["HGAN"], None):
        with pytest.raises(ValueError, match=f"must be one of {', '.join(known)}, got"):
            recognised(Namespace(system=odd))
    with pytest.raises(ValueError, match="module_name must be one of SGR, SAF, got 'AVE'"):
        build(Namespace(**{**vars(small(CATALOGUE["sgr"])), "module_name": "AVE"}))


@pytest.mark.slow
def test_submodules_are_attributes():
    code = "import itm_fast; print(itm_fast.models.scan.SCAN.__name__, itm_fast.models.dual_encoder.__name__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["SCAN", "itm_fast.models.dual_encoder"]
    assert {"SCAN", "load", "sgraf", "checkpoint"} <= set(dir(models))
    assert models.checkpoint is checkpoint


@pytest.mark.skipif(not README.is_file(), reason="needs a checkout")
def test_the_readmes_table_of_models_is_the_catalogue():
    told = {}
    for cells in re.findall(r"^\| (`.*?`) \| (.*?) \| (.*?) \|$", README.read_text(), re.MULTILINE):
        told |= dict.fromkeys(re.findall(r"`(\w+)`", cells[0]), cells[1:])
    assert {name: told.get(name) for name in CATALOGUE} == {
        name: (row.paper, row.known) for name, row in CATALOGUE.items()
    }
