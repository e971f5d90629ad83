"""The rules of the house."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parents[1]
FILES = sorted(p for folder in ("models", "trainers") for p in (HOUSE / folder).glob("*.py"))
ENTRIES = {"edm2", "ddpm", "progressive", "dmd"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_arrows(path):
    """trainers -> models, never back; accelerate and deepspeed in engine.py alone; no entry file imports another."""
    assert path.parent.name == "trainers" or "trainers" not in roots(path)
    assert path.name == "engine.py" or not roots(path) & {"accelerate", "deepspeed"}
    assert not {f"trainers.{entry}" for entry in ENTRIES} & imports(path)


@pytest.mark.parametrize("name", ["models/schedules", "models/denoiser", "models/sampling", "trainers/losses"])
def test_mathematics_imports_torch_and_models_only(name):
    """What is mathematics can be read and run in a plain Python prompt."""
    standard = set(sys.stdlib_module_names)
    assert roots(HOUSE / f"{name}.py") - standard <= {"torch", "models", "tqdm"}


def test_the_loop_knows_no_method():
    """`grep -n "dmd\\|progressive\\|edm2" trainers/trainer.py` finds nothing, and it stays short."""
    text = (HOUSE / "trainers/trainer.py").read_text()
    assert not any(entry in text for entry in ENTRIES) and len(text.splitlines()) <= 250


def test_no_file_bears_the_name_of_an_installed_module():
    """`accelerate launch trainers/dmd.py` puts trainers/ first on the path: a file there would hide a module of its name."""
    code = "import importlib.util, sys; print([n for n in sys.argv[1:] if importlib.util.find_spec(n)])"
    stems = [p.stem for p in FILES if p.stem != "__init__"]
    assert subprocess.run([sys.executable, "-I", "-c", code, *stems], capture_output=True, text=True, cwd="/").stdout.strip() == "[]"


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_functions_are_short_and_files_are_rooms(path):
    """No function over 80 lines, a method's `step` under 60; no `hasattr` dispatch and no host synchronisation in a step."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= (60 if node.name == "step" else 80), node.name
            if path.stem in ENTRIES and node.name in ("step", "loss", "generator_loss", "fake_loss", "generate"):
                called = {n.func.attr for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)}
                assert not called & {"item", "tolist", "cpu", "log", "write"}, node.name
    called = {n.func.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert not called & {"hasattr", "globals", "exec", "eval"}


def test_nothing_unpickles():
    """torch.load appears only with weights_only=True, pickle in one file, and no call is given trust_remote_code."""
    for path in FILES:
        assert not roots(path) & {"dill", "cloudpickle", "marshal", "shelve"}
        assert "pickle" not in roots(path) or path == HOUSE / "models/snapshots.py"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node)
            assert not (isinstance(node, ast.keyword) and node.arg == "trust_remote_code")


def test_the_one_unpickler_is_strict():
    """models/snapshots.py names pickle once, as the base of an Unpickler whose find_class never falls back on the base's."""
    path = HOUSE / "models/snapshots.py"
    nodes = list(ast.walk(ast.parse(path.read_text())))
    attributes = [ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)]
    names = [node.id for node in nodes if isinstance(node, ast.Name)]
    assert [name for name in imports(path) if name.split(".")[0].endswith("pickle")] == ["pickle"]
    assert names.count("pickle") == attributes.count("pickle.Unpickler") == 1  # so neither pickle.load nor pickle.loads
    strict, = (node for node in nodes if isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(ast.unparse, node.bases))
    assert "find_class" in {node.name for node in strict.body if isinstance(node, ast.FunctionDef)}
    assert not {"super", "getattr", "eval", "exec", "compile", "__import__"} & set(names)
    assert not [name for name in attributes if name.endswith((".find_class", "importlib.import_module")) or name == "torch.load"]


def test_the_commands_of_the_readme_exist():
    """Every file that the README names is there."""
    words = (HOUSE / "README.md").read_text().replace("`", " ").replace("(", " ").replace(")", " ").split()
    folders = ("models/", "trainers/", "recipes/", "accelerate_configs/", "slurm/", "tests/", "benchmarks/", "docs/")
    named = {w.rstrip(".,:;") for w in words if w.startswith(folders) and "NAME" not in w and "*" not in w}
    assert named and not [w for w in named if not (HOUSE / w).exists()]


def test_packages_are_the_ones_that_are_named():
    """Installed or not, `models` and `trainers` are these folders."""
    for package in ("models", "trainers"):
        assert Path(importlib.util.find_spec(package).origin).parent == HOUSE / package
