"""Who may import whom, what is public, and how large things may grow."""

import ast
import shutil
from dataclasses import replace

import pytest
from imports import MODULES, SOURCE, imports_of, names_in, reach, room

import fp4cast
from fp4cast.layouts import choose

GROUND = {"_require_torch", "_version", "errors", "extras", "formats"}

# From bottom to top: what each room may import, by room or by module; a room imports nothing that stands below it here.
ALLOWED = {
    "parallel": GROUND,
    "checkpoints": GROUND | {"parallel.progress"},
    "hub": GROUND | {"checkpoints", "parallel.progress", "parallel.workers"},
    "families": GROUND | {"checkpoints"},
    "layouts": GROUND | {"checkpoints", "families"},
    "casting": GROUND,
    "verification": GROUND
    | {"checkpoints", "families", "hub", "layouts.choose", "layouts.engine_rules", "layouts.engine_view", "layouts.fp8"}
    | {"layouts.gguf", "layouts.layout", "layouts.mlx", "layouts.read_back", "parallel"},
    "cards": GROUND | {"casting", "checkpoints", "families", "layouts", "verification"},
    "conversion": GROUND
    | {"cards", "casting", "checkpoints", "families", "hub", "layouts", "parallel", "verification"},
    "__init__": GROUND | {"casting", "conversion", "verification"},
    "kernels": GROUND,
    "torch": GROUND | {"casting", "kernels"},
    "miniatures": GROUND | {"checkpoints", "families"},
    "hf": GROUND | {"checkpoints", "layouts"},
    "vllm": GROUND | {"casting", "layouts", "torch"},
    "ptq": GROUND
    | {"casting", "checkpoints", "conversion", "families", "hub", "kernels", "layouts", "parallel", "verification"},
    "study": GROUND | {"casting", "checkpoints", "parallel"},
    "cli": GROUND
    | {"__init__", "casting", "checkpoints", "conversion", "hub", "layouts", "miniatures", "parallel", "ptq", "study"}
    | {"verification"},
    "__main__": {"cli"},
}
ROOMS = [name for name in ALLOWED if (SOURCE / name).is_dir()]


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_what_it_may(module):
    own = room(module)
    allowed = ALLOWED.get(own, GROUND)
    foreign = {name for name in imports_of(module) if room(name) != own}
    assert not {name for name in foreign if not {name, room(name)} & allowed}


def test_no_import_runs_up_and_no_room_is_forgotten():
    order = [*sorted(GROUND), *ALLOWED]
    for position, name in enumerate(order):
        assert not {room(each) for each in ALLOWED.get(name, set())} & set(order[position:])
    assert {room(module) for module in MODULES} == set(order)


def test_the_house_is_small_enough_to_know():
    assert len([module for module in MODULES if module == room(module) and module not in ROOMS]) <= 8
    for name in ROOMS:
        first, *_ = (ast.get_docstring(ast.parse((SOURCE / name / "__init__.py").read_text())) or "").splitlines()
        assert "nows" in ast.get_docstring(ast.parse((SOURCE / name / "__init__.py").read_text())), name
        assert first.endswith("."), name


def test_verification_reaches_nothing_that_casts_plans_or_writes():
    for module in MODULES:
        if room(module) == "verification":
            assert not {room(name) for name in reach(module)} & {"casting", "conversion", "kernels", "ptq", "torch"}


def test_verification_never_calls_what_writes_the_documents(miniatures, converted, tmp_path, monkeypatch):
    """It reaches the layouts' files for their rows, but reads configs by another hand: `engine_view`."""

    def refuse(_):
        pytest.fail("verification wrote a document")

    compressed = tmp_path / "compressed"
    fp4cast.convert(miniatures["moe"], compressed, layout="compressed-tensors")

    monkeypatch.setattr(choose, "LAYOUTS", tuple(replace(layout, documents=refuse) for layout in choose.LAYOUTS))
    for kind, source in miniatures.items():
        assert fp4cast.verify(source, converted[kind]).ok
    assert fp4cast.verify(miniatures["moe"], compressed).ok
    changed = shutil.copytree(converted["dense"], tmp_path / "dst")
    config = (changed / "config.json").read_text().replace('"ignore": [', '"ignore": ["model.layers.0.mlp.down_proj",')
    (changed / "config.json").write_text(config)
    assert not fp4cast.verify(miniatures["dense"], changed).ok


WITH_TORCH = {"_require_torch", "hf", "kernels", "ptq", "torch", "vllm"}


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) not in WITH_TORCH])
def test_the_core_needs_no_torch(module):
    heavy = {"torch", "transformers", "triton", "ray", "matplotlib", "safetensors", "ml_dtypes"}
    assert not {name.partition(".")[0] for name in names_in(MODULES[module])} & heavy


@pytest.mark.parametrize("module", MODULES)
def test_no_assert_on_what_comes_from_outside(module):
    tree = ast.parse(MODULES[module].read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_stay_small(module):
    text = MODULES[module].read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            length = (node.end_lineno or 0) - node.lineno + 1 - len(docstring.splitlines())
            assert length <= 50, f"{module}: {node.name} has {length} lines"


def test_the_public_names():
    assert fp4cast.__all__ == ["Cast", "Fp4CastError", "Inspection", "Report", "cast", "convert", "inspect", "verify"]
    for name in fp4cast.__all__:
        assert getattr(fp4cast, name).__doc__


def test_the_words_of_options_are_the_rows_of_their_tables():
    assert tuple(layout.name for layout in choose.LAYOUTS) == choose.LayoutName.__args__


def test_every_error_is_in_the_tree_of_the_docstring():
    from fp4cast import errors

    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert defined == set(errors.__all__)
    for name in defined:
        assert name in (errors.__doc__ or "")
        assert issubclass(getattr(errors, name), fp4cast.Fp4CastError)
