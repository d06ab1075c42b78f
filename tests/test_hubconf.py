"""torch.hub: one entry point per variant, and every package that they need is listed."""

import ast
import sys
from pathlib import Path

import pytest
import torch

import hubconf
from models import CONFIG_DIR, create_model, list_models

ROOT = CONFIG_DIR.parent


def test_the_public_names_are_the_variants():
    names = {name for name in dir(hubconf) if not name.startswith("_")}
    assert names - {"dependencies"} == set(list_models())
    assert all(getattr(hubconf, name).__doc__.startswith("Variant") for name in list_models())


def test_a_model_is_loaded_with_keywords_and_weights(tmp_path):
    trained = create_model("dhvt_tiny_cifar_patch4", num_classes=3)
    torch.save(dict(model=trained.state_dict()), tmp_path / "weights.pth")
    model = torch.hub.load(
        str(ROOT),
        "dhvt_tiny_cifar_patch4",
        source="local",
        num_classes=3,
        weights=str(tmp_path / "weights.pth"),
    )
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.state_dict().items())


def test_a_misspelt_keyword_is_an_error():
    with pytest.raises(ValueError, match=r"no argument \['classes'\]"):
        hubconf.dfvt_tiny(classes=3)


def test_dependencies_are_what_the_models_import():
    # Triton is imported where it is installed, and does without where it is not.
    imported = third_party(ROOT / "hubconf.py", seen=set()) - {"triton"}
    assert set(hubconf.dependencies) == imported


def third_party(path: Path, seen: set[Path]) -> set[str]:
    """Top-level packages, not of Python and not of ours, that importing `path` leads to."""
    seen.add(path)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.parents[node.level - 1].relative_to(ROOT).parts if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            own = [ROOT.joinpath(*parts).with_suffix(".py"), ROOT.joinpath(*parts, "__init__.py")]
            if (ROOT / parts[0]).is_dir() or (ROOT / f"{parts[0]}.py").is_file():
                own = [file for file in own if file.is_file()]
                # A package of models/ imports every module in it.
                below = [file for init in own for file in siblings(init)]
                for file in {*own, *below} - seen:
                    found |= third_party(file, seen)
            elif parts[0] not in sys.stdlib_module_names:
                found.add(parts[0])
    return found


def siblings(init: Path) -> list[Path]:
    """The modules beside the `__init__.py` of a package that imports them all."""
    return sorted(init.parent.glob("*.py")) if "iter_modules" in init.read_text() else []
