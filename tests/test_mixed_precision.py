"""Training under bfloat16 autocast goes where float32 goes, for every architecture and Fourier mixer."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from models import create_model, registry
from tests.small_models import SMALL

STEPS, BATCH, LAST = 200, 32, 40


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return images.expand(-1, 3, -1, -1), torch.tensor(data.target)


def small(family):
    name, overrides = SMALL[family]
    torch.manual_seed(0)
    return create_model(name, num_classes=10, drop_path_rate=0.0, **overrides), overrides[
        "img_size"
    ]


def losses(family, digits, bfloat16):
    """Losses of `STEPS` steps of AdamW on digits; the same initial weights and images each time."""
    model, size = small(family)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    images, labels = digits
    order = torch.Generator().manual_seed(0)
    torch.manual_seed(1)  # draws of grained queries
    found = []
    for _ in range(STEPS):
        batch = torch.randint(len(labels), (BATCH,), generator=order)
        x = F.interpolate(images[batch], size)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = F.cross_entropy(model(x).float(), labels[batch])
            loss = loss + sum(model.aux_losses().values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


def test_every_architecture_is_trained():
    assert {type(small(family)[0]) for family in SMALL} == {e.cls for e in registry.entries()}


@pytest.mark.slow
@pytest.mark.parametrize("family", SMALL)
def test_bfloat16_follows_float32_within_noise(family, digits):
    single, half = (losses(family, digits, bfloat16) for bfloat16 in (False, True))
    assert half.isfinite().all()
    learnt = single[:5].mean() - single[-LAST:].mean()
    # From batch to batch the loss varies by `std`; another order of the images changes the mean as much.
    bound = 0.05 + 0.5 * single[-LAST:].std()
    assert learnt > 2 * bound, "half precision that learns nothing would pass"
    assert (half[-LAST:].mean() - single[-LAST:].mean()).abs() < bound
