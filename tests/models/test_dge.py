"""Dynamic Grained Encoder: chosen queries, budget, complexity. Logits are compared in test_golden.py."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from engine import evaluate
from models import create_model
from models.dge import PVTDGE, DeiTDGE, GrainedBlock
from models.layers import grained
from models.layers.grained import ragged_attention
from models.layers.spatial_reduction import SpatialReductionAttention
from models.pretrained import load_pretrained
from tasks.classification import ClassificationTask
from tests.operators import Operators
from tests.reference.grained_encoder import grained_block
from utils.amp import Amp

SPLITS = [(4, 2, 1), (2, 4), (2, 1), (4,)]
# Map size and number of tokens before the map; the second and third are cut by the border.
GRIDS = [((8, 4), 1), ((5, 7), 0), ((9, 2), 2), ((1, 1), 1)]


def mixed_block(splits=(4, 2, 1), reduction=1, **keywords) -> GrainedBlock:
    """A block whose router chooses all granularities about equally often."""
    attn = SpatialReductionAttention(8, 2, reduction)
    block = GrainedBlock(8, attn, 2.0, splits, **keywords).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        block.dge.router.gate.bias.zero_()
        block.dge.router.gate.weight.normal_()
    return block


def small_deit(**keywords) -> DeiTDGE:
    defaults = dict(img_size=128, num_classes=5, embed_dim=16, depth=2, num_heads=2)
    return mix(DeiTDGE(**(defaults | keywords)))


def small_pvt(**keywords) -> PVTDGE:
    defaults = dict(
        img_size=128,
        num_classes=5,
        embed_dims=(8, 8, 16, 16),
        num_heads=(1, 2, 2, 2),
        mlp_ratios=(2, 2, 2, 2),
        depths=(1, 1, 1, 1),
    )
    return mix(PVTDGE(**(defaults | keywords)))


def mix(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.bias"):
                parameter.zero_()
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def one_hot(model_gates):
    return F.one_hot(model_gates.argmax(-1), model_gates.shape[-1]).float()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# -- one block -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("size", "extra"), GRIDS)
@pytest.mark.parametrize("splits", SPLITS)
def test_evaluation_equals_a_list_of_patches(splits, size, extra):
    block = mixed_block(splits)
    x = torch.randn(3, extra + size[0] * size[1], 8)
    output, routing = block(x, size)
    expected, choice, counts = grained_block(block, x, size, list(splits))
    assert routing.logits.argmax(-1).equal(choice)
    assert block.dge.num_queries(routing.gates, size, extra).tolist() == counts
    close(output, expected)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 12), (7, 5)])
def test_keys_of_a_reduced_map_equal_a_list_of_patches(size):
    block = mixed_block(reduction=2)
    x = torch.randn(2, size[0] * size[1], 8)
    close(block(x, size)[0], grained_block(block, x, size, [4, 2, 1])[0])


@pytest.mark.parametrize(("size", "extra"), GRIDS)
@pytest.mark.parametrize("splits", SPLITS)
def test_asking_all_equals_asking_the_chosen_for_one_hot_gates(splits, size, extra, monkeypatch):
    block = mixed_block(splits)
    x = torch.randn(3, extra + size[0] * size[1], 8, requires_grad=True)
    outputs = []
    for dense, other_way in ((True, "ask_chosen"), (False, "ask_all")):
        grained.set_dense_evaluation(block, dense)
        with monkeypatch.context() as patch:
            patch.setattr(block.dge, other_way, None)
            outputs.append(block(x, size)[0])
    close(*outputs)
    weight = torch.randn_like(outputs[0])
    wanted = [x, *block.attn.parameters(), *block.mlp.parameters()]
    grads = [
        torch.autograd.grad((output * weight).sum(), wanted, retain_graph=True)
        for output in outputs
    ]
    for dense, sparse in zip(*grads, strict=True):
        torch.testing.assert_close(dense, sparse, rtol=1e-3, atol=1e-3)


def test_training_gates_are_one_hot_with_the_gradient_of_the_softmax():
    block = mixed_block().train()
    x = torch.randn(2, 1 + 64, 8)
    gates = block(x, (8, 8))[1].gates
    torch.testing.assert_close(gates, one_hot(gates))
    gates[..., 0].sum().backward()
    assert block.dge.router.gate.weight.grad.abs().sum() > 0
    draws = {tuple(block(x, (8, 8))[1].gates.argmax(-1).flatten().tolist()) for _ in range(5)}
    assert len(draws) > 1


def test_drop_path_drops_single_queries():
    block = mixed_block(drop_path=0.5).train()
    dropped = block.drop_path(torch.ones(64, 8))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert (dropped == dropped[:, :1]).all()


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[3, 3], [5, 1, 2]])
def test_padded_attention_equals_attention_image_by_image(lengths, monkeypatch):
    q = torch.randn(sum(lengths), 8)
    k, v = torch.randn(2, len(lengths), 2, 6, 4).unbind(0)
    expected = ragged_attention(q, k, v, torch.tensor(lengths))
    # The way of accelerators, on the CPU.
    monkeypatch.setattr(grained, "splits_rows", lambda device: False)
    close(ragged_attention(q, k, v, torch.tensor(lengths)), expected)
    rows = q.split(lengths)
    for image, part in enumerate(expected.split(lengths)):
        for head in range(2):
            columns = slice(4 * head, 4 * head + 4)
            scores = rows[image][:, columns] @ k[image, head].t() / 2
            close(part[:, columns], scores.softmax(-1) @ v[image, head])


def test_router_prefers_the_finest_grain_at_first():
    for model in (DeiTDGE(img_size=64, depth=1), PVTDGE(img_size=128, depths=(1, 1, 1, 1))):
        routers = [m for m in model.modules() if isinstance(m, grained.Router)]
        assert routers
        for router in routers:
            assert router.gate.bias.softmax(0).tolist() == pytest.approx([0.95, 0.025, 0.025])
            assert router.gate.bias[0].item() == pytest.approx(1.818793, abs=1e-6)
            assert 0.007 < router.gate.weight.std() < 0.013


@pytest.mark.parametrize("build", [small_deit, small_pvt])
def test_weights_of_other_granularities_are_refused(build):
    model, state = build(splits=(4, 2, 1)), build(splits=(1, 2, 4)).state_dict()
    before = copy.deepcopy(model.state_dict())
    message = r"SPLITS=\[1, 2, 4\], this model among \[4, 2, 1\].*build the model with SPLITS"
    with pytest.raises(ValueError, match=rf"gate\.bias of SPLITS=\[1, 2, 4\].*{message}"):
        load_pretrained(model, state)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    report = load_pretrained(model, state, allow_partial=True)
    assert {name.split(".dge.")[1] for name in report.missing} == {
        "router.gate.weight",
        "router.gate.bias",
    }
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)


def test_a_state_dict_without_granularities_loads():
    source, model = small_deit(), small_deit()
    state = {n: t for n, t in source.state_dict().items() if not n.endswith("splits")}
    assert len(state) < len(source.state_dict())
    for load in (model.load_state_dict, lambda state: load_pretrained(small_deit(), state)):
        load(state)
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="router"):
        model.load_state_dict({n: t for n, t in state.items() if "router" not in n})


def test_splits_must_divide_the_largest():
    with pytest.raises(ValueError, match=r"SPLITS=\[4, 3\]"):
        mixed_block((4, 3))


# -- models ----------------------------------------------------------------------------------------


def test_static_complexity_is_the_published_number():
    with torch.device("meta"):
        model = create_model("deit_dge_s124_tiny_patch16_256")
    shared, of_query = model.blocks[0].macs(257, model.counted_products)
    block = shared + 257 * of_query
    assert block == 139_941_897 + 12_336
    assert 12 * block + model.fixed_macs(256 * 256) == 1_717_391_532
    assert 12 * block + model.fixed_macs(3 * 256) == 1_680_085_164


def macs_of_the_release(block, inputs, queries, counted_products):
    """Multiply-adds of a block, part by part."""
    dim, hidden, reduction = (
        block.attn.q.in_features,
        block.mlp.fc1.out_features,
        block.attn.reduction,
    )
    keys = inputs / reduction**2
    norms = 2 * inputs * dim
    projections = 2 * queries * dim**2 + 2 * keys * dim**2
    products = counted_products * queries * keys * dim + 3 * queries * keys * block.attn.num_heads
    coarser = inputs * dim**2 + keys * dim if reduction > 1 else 0
    mlp = 2 * queries * dim * hidden + queries * hidden
    router = inputs / block.dge.region**2 * dim * (1 + len(block.dge.steps))
    return norms + projections + products + coarser + mlp + router


@pytest.mark.parametrize("make", [small_deit, small_pvt])
@pytest.mark.parametrize("training", [True, False])
def test_complexity_is_the_formula_summed_over_all_blocks(make, training):
    model = make(splits=(6, 3, 1) if make is small_deit else (4, 2, 1)).train(training)
    model(torch.randn(3, 3, 128, 160))
    static, dynamic = model.complexity()
    assert static.grad_fn is None
    expected_static = expected_dynamic = model.fixed_macs(3 * 128)
    for name, routing, size, extra in model._last.blocks:
        block, inputs = model.get_submodule(name), extra + math.prod(size)
        counted = model.counted_products
        queries = block.dge.num_queries(routing.gates, size, extra).double()
        expected_static += macs_of_the_release(block, inputs, inputs, counted)
        expected_dynamic = expected_dynamic + macs_of_the_release(block, inputs, queries, counted)
    torch.testing.assert_close(static, torch.full_like(static, expected_static), rtol=1e-14, atol=0)
    torch.testing.assert_close(dynamic, expected_dynamic, rtol=1e-14, atol=0)
    if training:
        routers = [p for n, p in model.named_parameters() if ".gate." in n]
        found, expected = (
            torch.autograd.grad((macs.mean() / 1e9).square(), routers, retain_graph=True)
            for macs in (dynamic, expected_dynamic)
        )
        torch.testing.assert_close(found, expected)


def test_the_budget_takes_few_operators_however_many_blocks_there_are():
    counts = set()
    for depth in (2, 5):
        model = small_deit(depth=depth).train()
        model(torch.randn(2, 3, 64, 64))
        model.complexity()  # makes what is made once
        with Operators() as operators:
            model.aux_losses()
        counts.add(len(operators.names))
    assert max(counts) == min(counts) <= 20


@torch.no_grad()
def test_area_is_counted_as_in_the_release_unless_asked_otherwise():
    images = torch.randn(1, 3, 64, 96)
    model = small_deit()
    official = (model(images), model.complexity())[1]
    model.official_area = False
    difference = model.complexity().static - official.static
    assert difference.item() == (64 * 96 - 3 * 64) * 3 * 16


@torch.no_grad()
@pytest.mark.parametrize("make", [small_deit, small_pvt])
def test_complexity_is_per_image_and_grows_with_the_queries(make):
    model = make()
    images = torch.randn(3, 3, 128, 128)
    model(images)
    static, dynamic = model.complexity()
    assert static.shape == dynamic.shape == (3,)
    assert static.dtype is dynamic.dtype is torch.float64
    assert (dynamic < static).all()
    model(images[1:2])
    assert model.complexity().dynamic.item() == dynamic[1].item()
    for router in (m for m in model.modules() if isinstance(m, grained.Router)):
        router.gate.bias[0] += 1e4
    model(images)
    assert model.complexity().dynamic.tolist() == static.tolist()


@pytest.mark.parametrize("make", [small_deit, small_pvt])
def test_budget_loss_is_the_squared_distance_and_reaches_all_routers(make):
    model = make(budget=0.3, budget_weight=2.0).train()
    model(torch.randn(2, 3, 128, 128))
    static, dynamic = model.complexity()
    loss = model.aux_losses()["dge_budget"]
    ratio = (dynamic.mean() / static.mean()).item()
    assert loss.item() == pytest.approx(2.0 * (ratio - 0.3) ** 2, rel=1e-6)
    loss.backward()
    for name, parameter in model.named_parameters():
        if ".gate." in name:
            assert parameter.grad.abs().sum() > 0, name


def test_minimising_the_budget_loss_meets_the_budget():
    model = small_deit(budget=0.5).train()
    images = torch.randn(4, 3, 128, 128)
    gates = [p for n, p in model.named_parameters() if n.endswith("gate.bias")]
    for gate in gates:
        torch.nn.init.constant_(gate[:1], 3.0)
    optimizer = torch.optim.Adam(gates, lr=0.1)
    ratios = []
    for _ in range(40):
        model(images)
        static, dynamic = model.complexity()
        ratios.append((dynamic.mean() / static.mean()).item())
        optimizer.zero_grad()
        model.aux_losses()["dge_budget"].backward()
        optimizer.step()
    assert ratios[0] > 0.7
    assert sum(ratios[-10:]) / 10 == pytest.approx(0.5, abs=0.1)


def test_there_is_no_budget_loss_in_evaluation_nor_without_weight():
    model = small_deit()
    assert model.aux_losses() == {}
    with pytest.raises(RuntimeError, match="forward"):
        model.complexity()
    images = torch.randn(1, 3, 64, 64)
    model(images)
    assert model.aux_losses() == {}
    model = small_deit(budget_weight=0.0).train()
    model(images)
    assert model.aux_losses() == {}


@pytest.mark.parametrize("make", [small_deit, small_pvt])
def test_the_log_has_both_complexities_of_the_batch(make):
    model = make().train()
    assert model.log_values() == {}
    model(torch.randn(3, 3, 128, 128))
    static, dynamic = model.complexity()
    values = model.log_values()
    assert values["dge_static_gmacs"].item() == pytest.approx(static.mean().item() / 1e9)
    assert values["dge_dynamic_gmacs"].item() == pytest.approx(dynamic.mean().item() / 1e9)
    assert values["dge_ratio"].item() == pytest.approx((dynamic.sum() / static.sum()).item())
    assert all(value.ndim == 0 and not value.requires_grad for value in values.values())
    model.eval()(torch.randn(1, 3, 128, 128))
    assert model.log_values() == {}


def test_asking_for_the_log_first_leaves_the_budget_loss_its_gradient():
    model = small_deit().train()
    model(torch.randn(2, 3, 128, 128))
    with torch.no_grad():
        model.log_values()
    model.aux_losses()["dge_budget"].backward()
    assert model.blocks[0].dge.router.gate.weight.grad.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("make", [small_deit, small_pvt])
def test_each_image_has_its_own_values_in_evaluation(make):
    model = make()
    assert model.image_values() == {}
    images = torch.randn(5, 3, 128, 128)
    model(images)
    static, dynamic = model.complexity()
    values = model.image_values()
    assert values["dge_ratio"].tolist() == pytest.approx((dynamic / static).tolist())
    assert values["dge_dynamic_gmacs"].tolist() == pytest.approx((dynamic / 1e9).tolist())
    assert values["dge_static_gmacs"].tolist() == pytest.approx((static / 1e9).tolist())
    compiled = torch.compile(model, backend="eager")
    compiled(images[:2])
    assert model.image_values()["dge_ratio"].tolist() == values["dge_ratio"][:2].tolist()
    model.train()(images)
    assert model.image_values() == {}


def test_evaluation_reports_the_spread_over_images():
    model = small_deit()
    images, labels = torch.randn(7, 3, 128, 128), torch.zeros(7, dtype=torch.int64)
    batches = list(zip(images.split(3), labels.split(3), strict=True))
    scores = evaluate(model, ClassificationTask(5), batches, device=torch.device("cpu"), amp=Amp())
    with torch.no_grad():
        model(images)
    static, dynamic = model.complexity()
    ratios = (dynamic / static).sort().values.tolist()
    assert scores["dge_ratio_mean"] == pytest.approx(sum(ratios) / 7, abs=1e-6)
    # The 5th percentile of 7 numbers lies at 0.3 of the way from the first to the second.
    assert scores["dge_ratio_p5"] == pytest.approx(0.7 * ratios[0] + 0.3 * ratios[1], abs=1e-6)
    assert scores["dge_ratio_p95"] == pytest.approx(0.3 * ratios[5] + 0.7 * ratios[6], abs=1e-6)
    assert scores["images"] == 7


def test_a_model_can_be_copied_after_a_training_step():
    model = small_deit().train()
    images = torch.randn(1, 3, 64, 64)
    model(images)
    duplicate = copy.deepcopy(model).eval()
    assert duplicate.aux_losses() == {}
    with torch.no_grad():
        close(duplicate(images), model.eval()(images))


@torch.no_grad()
def test_token_maps_hold_one_choice_per_region():
    model = small_pvt()
    model(torch.randn(2, 3, 128, 144))
    maps = model.token_maps()
    for stage, stride in enumerate((4, 8, 16, 32), start=1):
        rows, columns = (math.ceil(math.ceil(side / stride) / 4) for side in (128, 144))
        choice = maps[f"grain::block{stage}.0.dge"]
        assert choice.shape == (2, rows, columns)
        assert maps[f"gate_logits::block{stage}.0.dge"].shape == (2, rows, columns, 3)
        assert choice.min() >= 0
        assert choice.max() <= 2
    model.train()(torch.randn(1, 3, 64, 64))
    assert model.token_maps() == {}


@torch.no_grad()
@pytest.mark.parametrize("make", [small_deit, small_pvt])
@pytest.mark.parametrize("size", [(128, 128), (75, 101), (32, 224)])
def test_training_without_noise_equals_evaluation_at_any_size(make, size, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, *_, **__: self.fill_(1.0))
    model = make()
    images = torch.randn(2, 3, *size)
    chosen, maps = model(images), model.forward_pyramid(images)
    model.train()
    close(model(images), chosen)
    for feature, expected in zip(model.forward_pyramid(images), maps, strict=True):
        close(feature, expected)


@torch.no_grad()
def test_no_decay_is_the_published_one():
    assert small_deit().no_weight_decay() == {"pos_embed", "cls_token"}
    assert small_pvt().no_weight_decay() == {"cls_token"}
