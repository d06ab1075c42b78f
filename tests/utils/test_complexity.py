import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import create_model
from utils.complexity import count, fft_flops

# Multiply-adds of the published code, counted by torch.utils.flop_counter, at 224 pixels.
PUBLISHED = {
    "deit_tiny_patch16_224": 1253683200,
    "deit_tiny_distilled_patch16_224": 1261003776,
    "dfformer_s18_afno": 4453134336,
    "gfformer_s18": 3789778944,
}


class Attend(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, attn_mask=torch.zeros(9, 9, device=x.device))


class Filter(nn.Module):
    def forward(self, x):
        return torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[-2:])


class Gate(nn.Module):
    """Shapes depend on numbers, as in DGE."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x.flatten(1)[:, :4][x.flatten(1)[:, 0] > -9])


def test_products_are_counted_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(128, 5))
    cost = count(model, (3, 8, 8))
    assert cost.modules[0].macs == 8 * 16 * 27 + 128 * 5
    assert cost.modules[0].params == 8 * 27 + 8 + 128 * 5 + 5
    assert cost.modules[0].activations == 8 * 16 + 128 + 5
    assert cost.modules[0].activation_mib == pytest.approx((8 * 16 + 128 + 5) * 4 / 2**20)
    assert [m.macs for m in cost.modules[1:]] == [8 * 16 * 27, 0, 128 * 5]
    assert cost.layer_outputs == 8 * 16 + 5
    assert cost.device == "meta"


class Called(nn.Module):
    """Layers without modules, and products that are none."""

    def forward(self, x):
        x = F.conv2d(x, x.new_zeros(6, 3, 1, 1)).flatten(2)  # B 6 64
        x = F.linear(x, x.new_zeros(5, 64))  # B 6 5
        x = torch.baddbmm(x.new_zeros(1, 4, 1), x.new_zeros(1, 4, 6).expand(len(x), -1, -1), x)
        return x @ x.transpose(1, 2)


def test_outputs_of_layers_that_are_called_as_functions_count():
    cost = count(Called(), torch.zeros(2, 3, 8, 8))
    assert cost.layer_outputs == 2 * (6 * 64 + 6 * 5 + 4 * 5)
    assert cost.per_image().layer_outputs == 6 * 64 + 6 * 5 + 4 * 5


def test_attention_is_counted():
    """Trap 14: FLOPs are wrong because scaled_dot_product_attention is not counted."""
    x = torch.zeros(2, 3, 9, 16)
    assert count(Attend(), x).modules[0].macs == 2 * 2 * 3 * 9 * 9 * 16


def test_fourier_transforms_are_counted_apart():
    cost = count(Filter(), (6, 8, 10))
    assert cost.gmacs == 0
    assert cost.modules[0].fft_flops == pytest.approx(2 * 2.5 * 6 * 80 * math.log2(80))
    assert cost.fft_gmacs == pytest.approx(cost.modules[0].fft_flops / 2e9)
    assert fft_flops(8, 1, is_complex=True) == 5 * 8 * 3


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_agree_with_the_published_code(name):
    """Trap 14: hand-written FLOPs are 8 to 13 % low."""
    cost = count(create_model(name, num_classes=1000), (3, 224, 224))
    assert cost.gmacs == pytest.approx(PUBLISHED[name] / 1e9, rel=0.01)
    assert (cost.fft_gmacs > 0) == ("former" in name)


def test_a_container_that_is_never_called_costs_what_its_children_cost():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 2)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    costs = {m.name: m for m in count(Net(), torch.zeros(1, 4)).modules}
    assert costs["layers"].macs == costs[""].macs == 4 * 4 + 4 * 2
    assert costs["layers"].activations == 6


def test_unchanged_outputs_are_no_activations():
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Dropout(0.5))
    assert count(model, torch.zeros(1, 4)).modules[0].activations == 4


def test_overwritten_outputs_count_as_in_training():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), Gate())
    assert count(model, torch.ones(2, 4)).modules[0].activations == 3 * 2 * 4


def test_shared_parameters_count_once():
    layer = nn.Linear(4, 4)
    assert count(nn.Sequential(layer, layer), torch.zeros(1, 4)).modules[0].params == 20


def test_a_model_with_shapes_that_depend_on_numbers_runs_for_real():
    model = Gate().train()
    cost = count(model, torch.zeros(3, 4))
    assert cost.device == "cpu"
    assert cost.modules[0].macs == 3 * 16
    assert model.training


def test_the_model_stays_as_it_is():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    count(model, torch.randn(3, 4))
    assert model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_wrapped_models_are_unwrapped():
    assert count(nn.DataParallel(nn.Linear(4, 2)), torch.zeros(1, 4)).modules[0].macs == 8


def test_the_report_is_a_table_and_json():
    block = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    cost = count(nn.Sequential(block, nn.Linear(4, 2)), torch.zeros(1, 4))
    lines = cost.to_text(depth=1).splitlines()
    assert len(lines) == 4
    assert lines[1].split()[:2] == ["total", "Sequential"]
    assert len(cost.to_text(depth=2).splitlines()) == 6
    report = json.loads(json.dumps(cost.to_dict(depth=1)))
    assert report["params_m"] == 30e-6
    assert report["gmacs"] == 24e-9
    assert [m["name"] for m in report["modules"]] == ["", "0", "1"]
