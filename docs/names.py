"""The public names of `fp4cast`, read from its source, with the first sentence of each docstring."""

from __future__ import annotations

import ast

from imports import MODULES, SOURCE

PUBLIC = ("fp4cast", "fp4cast.errors", "fp4cast.torch", "fp4cast.kernels", "fp4cast.hf", "fp4cast.ptq")
# Names that pages use from modules whose other names are not public.
USED = {
    "fp4cast.ptq": ("data.open_dataset", "data.tokenize", "load.load_model", "load.load_tokenizer"),
    "fp4cast": ("checkpoints.directory.open_checkpoint", "miniatures.make"),
}


def tree(module: str) -> ast.Module:
    """The source of a module, `fp4cast` or `fp4cast.x.y`."""
    return ast.parse(MODULES[module.removeprefix("fp4cast").removeprefix(".") or "__init__"].read_text())


def listed(module: str) -> list[str]:
    """What a module's `__all__` names, and what pages use beside it."""
    for node in tree(module).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return [*ast.literal_eval(node.value), *USED.get(module, ())]
    raise LookupError(f"{module} has no __all__")


def found(module: str, name: str) -> tuple[str, ast.stmt]:
    """(module, statement) that defines a name, which the given module may only import."""
    if "." in name:
        inner, _, name = name.rpartition(".")
        module = f"{module}.{inner}"
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if isinstance(target, ast.Name) and target.id == name:
                return module, node
        if isinstance(node, ast.ImportFrom) and node.module and name in [alias.name for alias in node.names]:
            return found(node.module, name)
    raise LookupError(f"{module} does not define {name}")


def names_table(module: str) -> str:
    """One line a public name, with a link to its file."""
    lines = ["| name | |", "|---|---|"]
    for name in listed(module):
        home, node = found(module, name)
        said = ast.get_docstring(node) if isinstance(node, ast.ClassDef | ast.FunctionDef) else ""
        sentence = (said or "").split("\n\n")[0].replace("\n", " ").replace("|", r"\|")
        path = MODULES[home.removeprefix("fp4cast.")].relative_to(SOURCE)
        lines.append(f"| `{module}.{name}` | {sentence or 'a table'} ([source](../src/fp4cast/{path})) |")
    return "\n".join(lines)
