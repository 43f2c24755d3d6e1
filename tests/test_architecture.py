"""Who may import whom, what is public, and how large things may grow."""

import ast
from pathlib import Path

import pytest

import fp4cast

SOURCE = Path(fp4cast.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))


def imports_of(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def reach(module):
    """Everything of fp4cast that a module imports, directly or not."""
    seen, todo = set(), [module]
    while todo:
        name = todo.pop()
        path = SOURCE / f"{name}.py"
        if name in seen or not path.exists():
            continue
        seen.add(name)
        todo += [i.removeprefix("fp4cast.") for i in imports_of(path) if i.startswith("fp4cast.")]
    return seen - {module}


@pytest.mark.parametrize("witness", ["verify", "checks", "match", "compare", "claims", "structure"])
def test_the_witness_shares_no_code_with_what_casts(witness):
    assert not reach(witness) & {
        "exact", "nearest", "scan", "plan", "pieces", "writer", "run", "configs", "conversion"
    }  # fmt: skip


ORDER = ["formats", "exact", "nearest", "scan", "plan", "run", "conversion", "cli"]


@pytest.mark.parametrize("module", ORDER)
def test_data_flows_one_way(module):
    assert not reach(module) & set(ORDER[ORDER.index(module) + 1 :])


CORE = [path for path in FILES if not {"kernels", "ptq", "hf", "torch.py"} & set(path.parts)]


@pytest.mark.parametrize("path", CORE, ids=lambda p: p.stem)
def test_the_core_needs_no_torch(path):
    heavy = {"torch", "transformers", "triton", "ray", "matplotlib", "safetensors", "ml_dtypes"}
    assert not {name.split(".")[0] for name in imports_of(path)} & heavy


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_no_assert_on_what_comes_from_outside(path):
    assert not [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            length = (node.end_lineno or 0) - node.lineno + 1 - len(docstring.splitlines())
            assert length <= 50, f"{path.name}: {node.name} has {length} lines"


def test_the_public_names():
    assert fp4cast.__all__ == ["Cast", "Fp4CastError", "Inspection", "Report", "cast", "convert", "inspect", "verify"]
    for name in fp4cast.__all__:
        assert getattr(fp4cast, name).__doc__


def test_every_error_is_in_the_tree_of_the_docstring():
    from fp4cast import errors

    for name in errors.__all__:
        assert name in (errors.__doc__ or "")
        assert issubclass(getattr(errors, name), fp4cast.Fp4CastError)
