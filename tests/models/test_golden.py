"""Our models give the numbers of the published code when they load its state dict."""

import numpy as np
import pytest
import torch

from tests.golden_tools import (
    FOLDER,
    MANIFEST,
    ROOT,
    Golden,
    is_constant,
    projection,
    relative_error,
)

NAMES = sorted(path.stem for path in FOLDER.glob("*.npz"))
BUILT = [name for name in NAMES if (ROOT / MANIFEST[name]["config"]).exists()]


@pytest.fixture(params=BUILT, scope="module")
def golden(request):
    return Golden(request.param)


def only_files_with(prefix):
    """Parametrise a test over the golden files that hold an array of this name."""
    names = []
    for name in BUILT:
        with np.load(FOLDER / f"{name}.npz") as file:
            if any(key.startswith(prefix) for key in file.files):
                names.append(name)
    return pytest.mark.parametrize("golden", names, indirect=True, scope="module")


def test_state_dict_has_the_published_names_types_and_shapes(golden):
    params = dict(golden.model.named_parameters())
    own = {
        name: (list(t.shape), str(t.dtype).removeprefix("torch."), name in params)
        for name, t in golden.model.state_dict().items()
    }
    published = {
        name: (shape, dtype, kind == "param" and dtype == "float32")
        for name, shape, dtype, kind in golden.meta["state_dict"]
    }
    learned = {name: entry for name, entry in own.items() if not is_constant(name)}
    assert learned == {name: entry for name, entry in published.items() if not is_constant(name)}
    for name in filter(is_constant, own.keys() & published.keys()):
        assert own[name] == published[name], name


def test_trainable_parameters_are_as_many_as_published(golden):
    count = sum(p.numel() for p in golden.model.parameters() if p.requires_grad)
    assert count == golden.meta["trainable_params"]


@only_files_with("logits")
def test_logits_equal_the_published_ones(golden):
    outputs, _ = golden.evaluated
    assert len(outputs) == 1
    assert relative_error(outputs[0], golden.arrays["logits"]) < 1e-4


@only_files_with("feature")
def test_pyramid_equals_the_published_features(golden):
    maps, _ = golden.evaluated
    for i, feature in enumerate(maps):
        summary = golden.meta[f"feature{i}"]
        assert list(feature.shape) == summary["shape"]
        assert feature.norm().item() == pytest.approx(summary["l2"], rel=1e-4)
        flat = feature.double().flatten()
        sample = flat[:: flat.numel() // 512][:512]
        assert relative_error(sample, golden.arrays[f"feature{i}_sample"]) < 1e-4
        direction = torch.from_numpy(projection(f"feature{i}", tuple(feature.shape))).flatten()
        # A projection of independent errors has the size of their norm.
        assert (flat @ direction.double()).item() == pytest.approx(
            summary["proj"], abs=1e-4 * summary["l2"]
        )


@only_files_with("kept_idx_")
def test_kept_tokens_equal_the_published_ones(golden):
    _, maps = golden.evaluated
    for key in golden.keys("kept_idx_"):
        # As sets: near-ties may change places between implementations.
        assert maps[key].sort(dim=1).values.tolist() == np.sort(golden.arrays[key], 1).tolist(), key


@only_files_with("gate_logits::")
def test_gates_equal_the_published_ones(golden):
    _, maps = golden.evaluated
    for key in golden.keys("gate_logits::"):
        assert relative_error(maps[key], golden.arrays[key]) < 1e-4, key
        assert maps[key].argmax(-1).tolist() == golden.arrays[key].argmax(-1).tolist(), key


def test_training_pass_equals_the_published_one(golden, monkeypatch):
    # -log(1) = 0: Gumbel noise, which only DGE draws, vanishes as it did in its golden files.
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, *_, **__: self.fill_(1.0))
    trained, reference = golden.trained, golden.train_meta
    assert len(trained.outputs) == reference["num_outputs"]
    if "train_logits" in golden.arrays:
        expected = golden.arrays["train_logits"].reshape(-1, *trained.outputs[0].shape)
        assert relative_error(torch.stack(trained.outputs), expected) < 1e-4
    assert trained.loss == pytest.approx(reference["loss"], rel=1e-4)

    # No gradient is recorded for the integer `splits` of DGE, published as a parameter.
    grads = {name: grad for name, grad in reference["grads"].items() if grad is not None}
    assert trained.grads.keys() == grads.keys()
    # Gradients that vanish in exact arithmetic (a bias before batch norm) are rounding noise.
    floor = 1e-5 * max(norm for norm, _ in grads.values())
    wrong = []
    for name, (norm, projected) in grads.items():
        grad = trained.grads[name].double()
        direction = torch.from_numpy(projection(f"grad:{name}", tuple(grad.shape))).double()
        tolerance = 1e-3 * norm + floor
        if (
            abs(grad.norm().item() - norm) > tolerance
            or abs((grad * direction).sum().item() - projected) > tolerance
        ):
            wrong.append(name)
    assert not wrong


def test_every_golden_file_has_its_config_once_the_family_exists():
    missing = [
        MANIFEST[name]["config"]
        for name in NAMES
        if name not in BUILT and any((ROOT / MANIFEST[name]["config"]).parent.glob("*.yaml"))
    ]
    assert not missing
