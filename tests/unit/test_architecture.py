"""The one direction of imports, and that no test is left out."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("dalle", "stage1_dvae", "stage2_prior", "cli")
# The longest name that a module is or lies under tells its level; what is new in dalle is ground.
LEVEL = {
    "dalle": 0,
    "stage1_dvae": 1,
    "stage2_prior": 1,
    "dalle.pipeline": 2,
    "dalle.drawings": 2,
    "dalle.export": 3,
    "dalle.bench": 3,
    "dalle.forecast": 2,
    "dalle.plan": 3,
    "dalle.plan_report": 4,
    "dalle.evaluate": 3,
    "dalle.report": 4,
    "dalle.demo": 5,
    "cli": 6,
}
HEAVY = {"torch", "numpy", "PIL", "tokenizers", "safetensors", "deepspeed", "einops", "jaxtyping", "rich"}

modules = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
each_module = pytest.mark.parametrize("path", modules, ids=lambda path: str(path.relative_to(ROOT)))


def part(module: str) -> str | None:
    """The longest name in LEVEL that `module` is or lies under; None for other people's modules."""
    return max((p for p in LEVEL if f"{module}.".startswith(f"{p}.")), key=len, default=None)


def imports(nodes: list[ast.AST]) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def everywhere(path: Path) -> set[str]:
    return imports(list(ast.walk(ast.parse(path.read_text()))))


def at_the_top(path: Path) -> set[str]:
    """What is imported as soon as the module is: outside of functions."""
    nodes, found = [ast.parse(path.read_text())], []
    while nodes:
        for node in ast.iter_child_nodes(nodes.pop()):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                nodes.append(node)
                found.append(node)
    return imports(found)


@each_module
def test_imports_point_downwards(path):
    here = part(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for there in filter(None, map(part, everywhere(path))):
        assert there == here or LEVEL[there] < LEVEL[here], f"{path} imports from {there}"


def test_the_roof_is_what_stands_on_the_stages():
    stages = ("stage1_dvae", "stage2_prior")
    roof = {
        "dalle." + ".".join(path.relative_to(ROOT / "dalle").with_suffix("").parts)
        for path in (ROOT / "dalle").rglob("*.py")
        if any(part(name) in stages for name in everywhere(path))
    }
    assert roof == {name for name in LEVEL if name.startswith("dalle.")}


def test_the_tests_of_the_direction_would_see_a_wrong_one(tmp_path):
    assert part("dalle.data.loader") == "dalle"
    assert part("dalle.pipeline.TextToImage") == "dalle.pipeline"
    assert part("dalle.pipelines") == "dalle"
    assert part("torch.nn") is None
    module = tmp_path / "module.py"
    module.write_text("import torch.nn as nn\ndef f():\n    from dalle.pipeline import TextToImage\n")
    assert everywhere(module) == {"torch.nn", "dalle.pipeline.TextToImage"}
    assert at_the_top(module) == {"torch.nn"}


def test_the_package_itself_imports_nothing():
    for package in PACKAGES:
        assert everywhere(ROOT / package / "__init__.py") == set(), package


def test_the_command_line_loads_nothing_heavy_at_its_top():
    top = {name.split(".")[0] for path in (ROOT / "cli").rglob("*.py") for name in at_the_top(path)}
    assert top & HEAVY == set()
    done = subprocess.run(
        [sys.executable, "-c", "import cli.main, sys; print(*{name.split('.')[0] for name in sys.modules})"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) & (HEAVY - {"rich"}) == set()


@each_module
def test_deepspeed_is_imported_in_functions_only(path):
    assert not any(name.split(".")[0] == "deepspeed" for name in at_the_top(path))


@each_module
def test_nothing_is_unpickled(path):
    if path.name == "released.py":
        return  # it reads pickles without running them
    assert not {"pickle", "dill", "joblib", "shelve"} & {name.split(".")[0] for name in everywhere(path)}
    assert "torch.load(" not in path.read_text()


def test_every_folder_of_tests_is_entered(pytestconfig):
    """A folder called `dist` or `build`, for one, would be passed over without a word."""
    passed_over = pytestconfig.getini("norecursedirs")
    patterns = pytestconfig.getini("python_files")
    for folder in filter(Path.is_dir, (ROOT / "tests").iterdir()):
        if folder.name == "__pycache__":
            continue
        assert any(path.match(pattern) for path in folder.iterdir() for pattern in patterns), folder
        assert not any(folder.match(pattern) for pattern in passed_over), folder
        assert not (folder / "__init__.py").exists(), folder  # their names are taken relative to the folder
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), "two modules of one name: pytest takes one for the other"
