"""The moving average against its formula."""

import pytest
import torch
from torch import nn

from utils.ema import ModelEma
from utils.wrappers import unwrap


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x):
        return self.norm(x)


def fill(model, value):
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(value)


def test_parameters_and_buffers_follow_the_formula():
    model = Toy()
    fill(model, 0)
    ema = ModelEma(model, decay=0.9)
    expected = 0.0
    for step, value in enumerate([1, 5, -2], start=1):
        fill(model, value)
        ema.update(model, step)
        expected = 0.9 * expected + 0.1 * value
    for name in ("norm.weight", "norm.running_mean"):
        assert ema.state_dict()[name].tolist() == pytest.approx([expected] * 2)
    assert ema.state_dict()["norm.num_batches_tracked"] == -2  # counts are copied, not averaged


def test_warm_up_copies_first_and_never_exceeds_the_decay():
    model = Toy()
    fill(model, 0)
    ema = ModelEma(model, decay=0.5, warmup=True)
    fill(model, 4)
    ema.update(model, 1)
    assert ema.state_dict()["norm.weight"].tolist() == [4, 4]
    fill(model, 0)
    ema.update(model, 2)  # 1 - 2^(-2/3) = 0.37
    assert ema.state_dict()["norm.weight"].tolist() == pytest.approx([4 * (1 - 2 ** (-2 / 3))] * 2)
    fill(ema.module, 4)
    ema.update(model, 1000)
    assert ema.state_dict()["norm.weight"].tolist() == [2, 2]


def test_the_average_is_a_frozen_copy_in_eval_mode():
    model = Toy()
    ema = ModelEma(model)
    assert not ema.module.training
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert all(p.requires_grad for p in model.parameters())
    fill(model, 7)
    assert ema.state_dict()["norm.weight"].tolist() == [1, 1]


def test_wrappers_do_not_change_the_names():
    """Trap: `module.` and `_orig_mod.` prefixes make a checkpoint unreadable."""
    model = Toy()
    compiled = torch.compile(model, backend="eager")
    wrapped = nn.DataParallel(compiled)
    assert unwrap(wrapped) is model
    ema = ModelEma(wrapped, decay=0.0)
    fill(model, 3)
    ema.update(wrapped, 1)
    assert list(ema.state_dict()) == list(model.state_dict())
    assert ema.state_dict()["norm.weight"].tolist() == [3, 3]


def test_the_average_survives_a_checkpoint():
    model = Toy()
    ema, restored = ModelEma(model, decay=0.9), ModelEma(model, decay=0.9)
    fill(model, 3)
    ema.update(model, 1)
    restored.load_state_dict(ema.state_dict())
    for name, value in ema.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value)


def test_a_decay_that_never_learns_is_an_error():
    with pytest.raises(ValueError, match=r"EMA.DECAY=1.0"):
        ModelEma(Toy(), decay=1.0)
