"""Imports point down, nothing points up; the core needs torch alone."""

import ast
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "hyperopt_torch"

# A module may import from groups below its own.
LAYERS = [
    {"_tensors", "errors", "report", "_refusals", "_room"},
    {"_graph", "_half"},
    {"recording", "inner_optimizer"},
    {"inner_gradient", "plain_gradient"},
    {"operators"},
    {"curvature", "ihvp", "distributed"},
    {"estimators"},
    {"_default", "_checked", "_judged", "_inner_level"},
    {"bilevel", "functional", "health"},
    {"checking"},
    {"__init__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
BASES = {"base", "__init__"}
ROOMS = {
    "recording",
    "inner_optimizer",
    "distributed",
}  # one thing in several files, not strategies


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, path.relative_to(PACKAGE).with_suffix("").parts


def imports(path, parts):
    """Absolute names, relative to the package for its own modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = list(parts[: -node.level]) if node.level <= len(parts) else []
            target = base + (node.module.split(".") if node.module else [])
            names = [a.name for a in node.names] if node.module is None else [None]
            for name in names:
                yield "hyperopt_torch", tuple(target + ([name] if name else []))
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0], tuple(node.module.split(".")[1:])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], ()


def test_every_module_has_a_layer():
    assert {parts[0] for _, parts in modules()} == set(LEVEL)


def test_imports_point_down():
    for path, parts in modules():
        for package, target in imports(path, parts):
            if package != "hyperopt_torch" or not target:
                continue
            here, there = parts[0], target[0]
            if here == there:  # siblings meet in their base and in private modules only
                allowed = here in ROOMS or parts[-1] == "__init__"
                allowed = allowed or target[-1] in BASES or target[-1][0] == "_"
                assert allowed, f"{path.name} imports its sibling {'.'.join(target)}"
            else:
                assert LEVEL[there] < LEVEL[here], f"{path.name} imports {'.'.join(target)}"


def test_leaves_import_nothing_of_the_package():
    for path, parts in modules():
        if parts[0] in LAYERS[0]:
            assert all(package != "hyperopt_torch" for package, _ in imports(path, parts))


def test_core_needs_torch_alone():
    for path, parts in modules():
        for package, _ in imports(path, parts):
            asked = {"matplotlib"} if path.name == "health.py" else set()  # inside plot()
            assert package in {"torch", "hyperopt_torch", *sys.stdlib_module_names} | asked, path


def test_no_strategy_sees_a_model_an_optimizer_or_a_loss():
    for path, parts in modules():
        if parts[0] == "ihvp":
            text = path.read_text()
            assert "torch.nn" not in text.replace("torch.nn.functional.pad", "")
            assert "torch.optim" not in text
            assert "autograd" not in text


def test_no_device_is_named_on_the_hot_path():
    for path, _ in modules():
        text = path.read_text()
        assert ".cpu()" not in text
        assert ".cuda(" not in text
