"""Each package imports from its own layer or lower ones, at the top of its modules, and never in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
LAYERS = {
    "utils.process": 1,
    "utils.data": 2,
    "utils.module": 2,
    "utils.demo": 2,
    "utils.ds_utils": 2,
    "utils.precision": 2,
    "utils.model": 3,
}
LAYERS |= {f"utils.{package}": 4 for package in ("arguments", "generation", "engine", "perf")}
LAYERS |= {"utils.run": 5, "utils.utils": 5, "utils.planning": 6, "utils.plan": 6}
LAYERS |= {"training": 7, "inference": 7, "evaluation_scripts": 7}
SOURCES = [
    file for top in ("utils", "training", "inference", "evaluation_scripts") for file in PROJECT.glob(f"{top}/**/*.py")
]
MODULES = {
    ".".join(file.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__"): file for file in SOURCES
}


def imports(tree: ast.AST) -> set[str]:
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {
                f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in MODULES else node.module
                for alias in node.names
            }
    return names & MODULES.keys()


def layer(module: str) -> int:
    return next(
        (LAYERS[package] for package in (module, module.rpartition(".")[0]) if package in LAYERS),
        LAYERS.get(module.partition(".")[0], 0),
    )


def test_packages_import_downwards_at_the_top_and_never_in_a_circle():
    trees = {module: ast.parse(file.read_text()) for module, file in MODULES.items()}
    graph = {module: imports(tree) - {module} for module, tree in trees.items()}
    upwards = [f"{module} -> {used}" for module in graph for used in graph[module] if layer(used) > layer(module)]
    functions = {
        m: [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        for m, tree in trees.items()
    }
    inside = [f"{module}, {f.name}: {imports(f)}" for module in functions for f in functions[module] if imports(f)]
    assert (upwards, inside) == ([], [])
    TopologicalSorter(graph).prepare()  # raises CycleError, naming the circle


def test_the_steps_follow_their_launcher_before_they_load_packages():
    for file in PROJECT.glob("training/*/main.py"):
        after = file.read_text().partition("sys.path.insert(")[2].partition("\n")[2]
        first = next(node for node in ast.parse(after).body if isinstance(node, ast.Import | ast.ImportFrom))
        assert ast.unparse(first) == "import utils.process.follow_launcher", file
