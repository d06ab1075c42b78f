"""Rules of the house that a reader of one file cannot see: who may import whom, and what stays where."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {".venv", "tests", "tools", "benchmarks", "output"}
SOURCES = sorted(
    path for path in ROOT.rglob("*.py") if not SKIPPED & set(path.relative_to(ROOT).parts)
)

# Each room and the rooms below it that it may import.
BELOW = {
    "main": {"config", "modes", "utils"},
    "modes": {
        "config",
        "engine",
        "tasks",
        "models",
        "data",
        "optimizer",
        "lr_scheduler",
        "utils",
        "logger",
    },
    "config": {"models", "utils"},
    "engine": {"models", "utils"},
    "tasks": {"models", "data", "utils"},
    "optimizer": {"models", "utils"},
    "lr_scheduler": {"optimizer", "models", "utils"},
    "data": {"models", "utils"},
    "models": {"utils"},
    "logger": {"utils"},
    "utils": set(),
    "hubconf": {"models"},
}
# create_model(name) reads a YAML file, and config.py reads its schema from the models.
EXCEPTIONS = {("models/__init__.py", "config")}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = room(path)
    rooms = {name.split(".")[0] for name in imported(ast.parse(path.read_text()))} & set(BELOW)
    forbidden = {
        name
        for name in rooms - BELOW[own] - {own}
        if (str(path.relative_to(ROOT)), name) not in EXCEPTIONS
    }
    assert not forbidden, f"{own} must not import {sorted(forbidden)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_has_one_place_stays_there(path):
    text = path.read_text()
    if path.name != "config.py":
        assert "defrost(" not in text, "config.py is the only code that changes a CfgNode"
    assert ".cuda(" not in text, "devices are passed, not assumed"
    if (
        room(path) not in ("main", "modes", "config")
        and path.name != "build.py"
        and "def build_" not in text
    ):
        assert "config." not in text.replace("config.py", "").replace("yacs.config", ""), (
            "only config.py, main.py and build_* functions see the config"
        )


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_private_modules_of_libraries_are_not_imported(path):
    """Trap 3: installs break on torch._six, timm's moved modules and the like."""
    for name in imported(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] in ("timm", "torchvision", "torch"):
            assert not any(part.startswith("_") for part in parts), name


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if room(path) in ("engine", "main", "modes")],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_the_engine_asks_for_no_model_or_task_by_name(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            text = ast.unparse(node)
            assert "MODEL.TYPE" not in text, text
            assert "TASK" not in text, text
