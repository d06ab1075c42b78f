"""What engine, tasks and tools rely on holds for every architecture (`models/backbone.py`).

Names, counts and prefixes are checked for every variant, on shapes alone. Numbers are checked for the
smallest variant of each kind: an architecture with its switches, such as a mixer or a distillation token.
"""

import copy
import json
import pickle
import re
import warnings
from functools import cache
from itertools import pairwise
from math import ceil

import pytest
import torch
from torch import Tensor, nn

from config import load_config
from models import create_model, list_models, registry, variant_file
from models.layers.grained import set_dense_evaluation
from models.pretrained import load_pretrained
from tests.golden_tools import FOLDER, SkipInit, fill_module_, is_constant, relative_error
from tests.small_models import METAFORMER, SMALL
from utils.ema import ModelEma

PARAMETERS: dict[str, int] = json.loads((FOLDER / "parameters.json").read_text())
SIZES = [(64, 64), (96, 64), (75, 101), (32, 32), (33, 47)]
# Frames whose mixers choose the rows that a block runs for.
CHOOSING = {
    option: ("dfformer_s18", METAFORMER | dict(mixers=[f"{name}({option})" for name in mixers]))
    for mixers in [("attention", "head_token", "spatial_reduction", "attention")]
    for option in ("keep_rate=0.6", "grained=True")
}


@cache
def shapes_of(name):
    with torch.device("meta"), SkipInit():
        return create_model(name)


def kind(name):
    """The architecture and its switches; sizes, and the options of a mixer, are left out."""
    model = load_config(variant_file(name)).MODEL
    entry = registry.find(model.TYPE)
    values = {key: model[entry.node][key.upper()] for key in entry.fields}
    switches = {
        key: v for key, v in values.items() if isinstance(v, (bool, str)) or "str" in kinds(v)
    }
    return re.sub(r"\(.*?\)", "", json.dumps([entry.name, switches], sort_keys=True))


def kinds(value):
    return {type(item).__name__ for item in value} if isinstance(value, list) else set()


def smallest_of_each_kind():
    best = {}
    for name in sorted(list_models(), key=lambda name: PARAMETERS.get(name, 0)):
        best.setdefault(kind(name), name)
    return sorted(best.values())


def build(name, **overrides):
    """A variant with weights that use every path (a fresh block of Swin v2, for one, is the identity)."""
    return fill_module_(create_model(name, drop_rate=0.0, **overrides)).eval()


def small(family):
    variant, sizes = (SMALL | CHOOSING)[family]
    return build(variant, num_classes=5, **sizes)


def images(size=SIZES[0], channels=3, batch=2):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def flat(outputs):
    return [outputs] if isinstance(outputs, Tensor) else outputs


def total(outputs):
    """Mean square over one output, or several."""
    return torch.stack([output.square().mean() for output in flat(outputs)]).sum()


def without_finite_gradient(model):
    return [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]


@pytest.fixture(scope="module", params=smallest_of_each_kind())
def name(request):
    return request.param


@pytest.fixture(scope="module")
def shared(name):
    return build(name)


@pytest.fixture
def model(shared):
    """A copy that the test may change."""
    return copy.deepcopy(shared)


@pytest.fixture(scope="module")
def shared_dense(name):
    return build(name, num_classes=0)


@pytest.fixture
def dense(shared_dense):
    """As dense tasks build it: without a classifier."""
    model = copy.deepcopy(shared_dense)
    if model.drops_tokens:
        pytest.skip("drops tokens, so it has no feature map")
    return model


# -- every variant, on shapes alone ----------------------------------------------------------------


@pytest.mark.parametrize("variant", [name for name in list_models() if name in PARAMETERS])
def test_variant_has_the_published_number_of_parameters(variant):
    """An architecture that somebody adds has none: it takes two files."""
    count = sum(p.numel() for p in shapes_of(variant).parameters() if p.requires_grad)
    assert count == PARAMETERS[variant]


def test_every_published_parameter_count_belongs_to_a_variant():
    families = {variant_file(name).parent.name for name in list_models()}
    strays = [name for name in PARAMETERS if name.split("_")[0] in families]
    assert not set(strays) - set(list_models())


@pytest.mark.parametrize("variant", list_models())
def test_names_for_the_optimizer_exist(variant):
    model = shapes_of(variant)
    names = [name for name, _ in model.named_parameters()]
    assert model.no_weight_decay() <= set(names)
    for prefix in model.lr_multipliers():
        assert any(name.startswith(prefix) for name in names), prefix


@pytest.mark.parametrize("variant", list_models())
def test_layer_ids_rise_from_the_stem_to_the_head(variant):
    model = shapes_of(variant)
    ids = {name: model.layer_id(name) for name, _ in model.named_parameters()}
    assert set(ids.values()) == set(range(model.num_layers()))
    first_convolution = next(name for name, p in model.named_parameters() if p.ndim == 4)
    assert ids[first_convolution] == 0
    in_head = {id(p) for p in model.get_classifier().parameters()}
    assert in_head
    assert {ids[n] for n, p in model.named_parameters() if id(p) in in_head} == {max(ids.values())}


@pytest.mark.parametrize("variant", list_models())
def test_feature_info_goes_from_fine_to_coarse(variant):
    info = shapes_of(variant).feature_info
    assert all(fine["stride"] < coarse["stride"] for fine, coarse in pairwise(info))
    assert all(entry["channels"] > 0 for entry in info)


# -- one variant of each kind, on numbers ----------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pyramid_matches_feature_info(dense, size):
    maps = dense.forward_pyramid(images(size))
    assert len(maps) == len(dense.feature_info)
    for feature, info in zip(maps, dense.feature_info, strict=True):
        stride = info["stride"]
        assert feature.shape == (
            2,
            info["channels"],
            ceil(size[0] / stride),
            ceil(size[1] / stride),
        )
        assert feature.isfinite().all()


def test_a_model_that_drops_tokens_says_that_it_has_no_pyramid(shared):
    if not shared.drops_tokens:
        pytest.skip("keeps its tokens")
    with pytest.raises(ValueError, match="token"):
        shared.forward_pyramid(images())


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_logits_have_one_row_per_image(shared, size):
    with torch.no_grad():
        logits = shared(images(size))
    assert logits.shape == (2, shared.num_classes)
    assert logits.isfinite().all()


def test_every_parameter_gets_a_finite_gradient(model):
    total(model.train()(images())).backward()
    assert not without_finite_gradient(model)


def test_every_parameter_of_a_dense_backbone_gets_a_finite_gradient(dense):
    total(dense.train().forward_pyramid(images())).backward()
    assert not without_finite_gradient(dense)


@pytest.mark.parametrize("training", [False, True])
def test_no_tensor_is_made_on_another_device_than_the_input(model, training):
    """Pointwise operations refuse to mix the device "meta" and a CPU, as they refuse a GPU and a CPU."""
    set_dense_evaluation(model, True)  # which rows to keep is unknown without values
    model.to("meta").train(training)
    x = images().to("meta")
    outputs = model(x)
    assert {output.device.type for output in flat(outputs)} == {"meta"}
    if training:
        total(outputs).backward()
        assert all(p.grad.device.type == "meta" for p in model.parameters())
    if not model.drops_tokens:
        assert {level.device.type for level in model.forward_pyramid(x)} == {"meta"}


@torch.no_grad()
def test_evaluation_is_deterministic_and_independent_of_batch_mates(shared):
    x = images(batch=3)
    logits = shared(x)
    assert torch.equal(logits, shared(x))
    for row in range(3):
        assert relative_error(shared(x[row : row + 1]), logits[row : row + 1]) < 1e-5


@torch.no_grad()
def test_forward_is_the_head_after_the_features(shared):
    x = images()
    features = shared.forward_features(x)
    assert torch.equal(shared(x), shared.forward_head(features))
    pooled = shared.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, shared.num_features)


@torch.no_grad()
def test_state_dict_carries_everything(shared, model):
    for entry, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not is_constant(entry):
            tensor.mul_(0.5)
    assert not torch.equal(model(images()), shared(images()))
    model.load_state_dict(shared.state_dict(), strict=True)
    assert torch.equal(model(images()), shared(images()))


@torch.no_grad()
def test_classifier_can_be_replaced_and_removed(model):
    model.reset_classifier(5)
    assert model.num_classes == 5
    assert model(images()).shape == (2, 5)
    names = list(model.state_dict())
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(images()).shape == (2, model.num_features)
    model.reset_classifier(5)
    assert sorted(model.state_dict()) == sorted(names)
    assert model(images()).shape == (2, 5)


def test_without_its_classifier_it_is_built_as_for_dense_tasks_and_back(model, shared_dense):
    with_classifier = set(model.state_dict())
    for num_classes, expected in ((0, set(shared_dense.state_dict())), (5, with_classifier)):
        model.reset_classifier(num_classes)
        assert set(model.state_dict()) == expected
        model.zero_grad()
        dense = num_classes == 0 and not model.drops_tokens
        forward = model.train().forward_pyramid if dense else model.train()
        total(forward(images())).backward()
        assert not without_finite_gradient(model)


@torch.no_grad()
def test_what_a_new_classifier_brings_evaluates_and_trains_as_the_model_does(name):
    model = fill_module_(create_model(name, drop_rate=0.5)).eval()
    for num_classes in (5, 0, 5):
        model.reset_classifier(num_classes)
        assert not [path for path, module in model.named_modules() if module.training]
        assert torch.equal(model(images()), model(images()))
    model.train()
    frozen = next(m for m in model.modules() if not list(m.children())).eval()
    for num_classes in (7, 0, 7):
        model.reset_classifier(num_classes)
        assert all(m.training for m in model.modules() if m is not frozen)
        assert not frozen.training, "what was there is left alone"


def body(model):
    """Copies of all but the classifiers, which are always fresh, and the tables that DFvT resizes."""
    return {
        entry: tensor.clone()
        for entry, tensor in model.state_dict().items()
        if not entry.startswith("head") and not entry.endswith("_bias_table")
    }


def test_layers_that_go_with_the_classifier_come_back_as_they_were(model):
    with_classifier = body(model)
    model.reset_classifier(0)
    without = body(model)
    for num_classes, expected in ((5, with_classifier), (0, without), (5, with_classifier)):
        model.reset_classifier(num_classes)
        torch.testing.assert_close(body(model), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["pvt", "dhvt", "dfformer"])
def test_layers_of_other_weights_do_not_come_back(family):
    variant, sizes = SMALL[family]
    model = build(variant, **sizes)
    before = body(model)
    model.reset_classifier(0)
    gone = before.keys() - body(model).keys()
    assert gone
    model.load_state_dict(model.state_dict())
    model.reset_classifier(5)
    after = body(model)
    assert not [entry for entry in gone if torch.equal(after[entry], before[entry])]


@pytest.mark.parametrize("family", ["swin", "dfvt"])
def test_a_layer_that_stays_under_another_name_keeps_what_it_learns(family):
    variant, sizes = SMALL[family]
    model = build(variant, **sizes)
    model.reset_classifier(0)
    model.reset_classifier(5)
    model.reset_classifier(0)
    with torch.no_grad():
        model.final_norm.weight.fill_(7)
    model.reset_classifier(5)
    assert model.norm.weight.eq(7).all()


@torch.no_grad()
def test_a_new_classifier_has_the_type_of_the_model(model):
    model.double().reset_classifier(0)
    model.reset_classifier(5)
    assert model(images().double()).dtype == torch.float64


def test_classification_weights_start_a_dense_backbone(shared, dense):
    report = load_pretrained(dense, shared.state_dict())
    assert report.loaded > 0.8 * len(dense.state_dict())
    stray = [n for n in (*report.missing, *report.unexpected) if not is_under_differences(dense, n)]
    assert not stray


def is_under_differences(model, name):
    return any(name == p or name.startswith(p + ".") for p in model.dense_differences())


def test_token_maps_describe_the_last_evaluation_forward(model):
    learned = model.token_maps()
    assert not [n for n in learned if not n.startswith(("filters::", "stages."))]
    with torch.inference_mode():
        model(images((64, 32)))
        model(images((37, 64), batch=3))
    maps = model.token_maps()
    tellers = ("attention_maps", "token_map")  # pooling, for one, has nothing to tell
    assert maps or not any(hasattr(m, name) for m in model.modules() for name in tellers)
    for entry, value in maps.items():
        assert value.isfinite().all(), entry
        assert not value.requires_grad, entry
        if entry in learned:
            assert torch.equal(value, learned[entry])
            continue
        assert len(value) == 3, entry
        if entry.startswith("attention::"):
            assert value.is_floating_point(), entry
            assert value.min() >= 0, entry
            assert value.flatten(2).max() <= 1 + 1e-5, entry

    assert copy.deepcopy(model).token_maps().keys() == learned.keys()
    duplicate = pickle.loads(pickle.dumps(model))
    assert duplicate.token_maps().keys() == learned.keys()
    with torch.no_grad():
        duplicate(images((64, 32)))
    assert duplicate.token_maps().keys() == maps.keys()
    assert model.train().token_maps().keys() == learned.keys()
    model(images((64, 32)))
    assert model.token_maps().keys() == learned.keys()


@pytest.mark.parametrize("family", SMALL | CHOOSING)
def test_what_a_forward_left_is_gone_after_a_change_of_mode_and_on_copies(family):
    model = small(family)
    learned = model.token_maps().keys()
    changes = dict(
        eval=lambda: model.eval(),
        train=lambda: model.train(),
        copy=lambda: copy.deepcopy(model),
        pickle=lambda: pickle.loads(pickle.dumps(model)),
    )
    for training in (False, True):
        for how, change in changes.items():
            model.train(training)(images())
            changed = change()
            assert changed.token_maps().keys() == learned, how
            assert changed.aux_losses() == changed.image_values() == {}, how


@pytest.mark.parametrize(
    ("exporter", "family"),
    [
        *[("torch.export", family) for family in ("evit", "deit_dge")],
        *[
            ("torch.jit.trace", family)
            for family in ("deit", "dfvt", "evit", "deit_dge", *CHOOSING)
        ],
    ],
)
@torch.no_grad()
def test_exporters_leave_nothing_behind(exporter, family):
    model, x = small(family), images()
    model(images(batch=3))
    maps, values = model.token_maps(), model.image_values()
    set_dense_evaluation(model, True)  # as tools/export.py does
    if exporter == "torch.export":
        torch.export.export(model, (x,), strict=False)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer, about itself
            torch.jit.trace(model, x, check_trace=False)
    torch.testing.assert_close(model.token_maps(), maps, rtol=0, atol=0)
    torch.testing.assert_close(model.image_values(), values, rtol=0, atol=0)


@pytest.mark.parametrize("family", SMALL | CHOOSING)
@pytest.mark.parametrize("training", [False, True])
def test_a_batch_may_be_empty(family, training):
    model = small(family).train(training)
    state = copy.deepcopy(model.state_dict())
    outputs = model(images(batch=0))
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    for kind, logits in zip(model.training_outputs, outputs, strict=training):
        assert logits.shape == ((0, 2 * 2, 5) if kind == "tokens" else (0, 5))
    if training:
        torch.stack([logits.sum() for logits in outputs]).sum().backward()
        assert not without_finite_gradient(model)
    for entry, tensor in model.state_dict().items():
        counts = entry.endswith("num_batches_tracked")
        assert counts or torch.equal(tensor, state[entry]), entry


@pytest.mark.parametrize("family", ["swin", "swinv2", "dfvt"])
def test_a_moving_average_has_the_constants_of_the_model(family):
    """Of masks that hide padding too, as Swin has them at 32 px in windows of 7."""
    variant, sizes = SMALL[family]
    model = build(variant, **sizes | dict(window_size=4, img_size=72))
    constants = {name: b for name, b in model.state_dict().items() if is_constant(name)}
    assert any(constant.min() < -100 for constant in constants.values())
    ema = ModelEma(model, decay=0.9)
    for step in range(1, 4):
        ema.update(model, step)
    averaged = ema.state_dict()
    assert all(torch.equal(averaged[name], constant) for name, constant in constants.items())
    with torch.no_grad():
        torch.testing.assert_close(ema.module(images((72, 72))), model(images((72, 72))))


def test_token_maps_keep_no_graph_and_follow_a_cast(model):
    model(images())
    before = model.token_maps()
    assert all(not value.requires_grad for value in before.values())
    after = model.double().token_maps()
    assert after.keys() == before.keys()
    for entry, value in after.items():
        if entry.startswith(("attention::", "points::")):
            assert value.dtype == torch.float64
            torch.testing.assert_close(value.float(), before[entry], rtol=1e-3, atol=1e-4)


def test_recomputing_activations_changes_neither_loss_nor_gradients_nor_statistics(model):
    state = copy.deepcopy(model.state_dict())
    results = []
    for checkpointing in (False, True):
        model.load_state_dict(state)
        model.train().set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(0)
        loss = total(model(images()))
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        results.append((loss.item(), grads, buffers))
    (loss, grads, buffers), (again, grads_again, buffers_again) = results
    assert again == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(buffers_again, buffers)
    floor = 1e-6 * max(grad.norm() for grad in grads.values()).item()
    for name, grad in grads.items():
        assert (grads_again[name] - grad).norm() <= 1e-4 * grad.norm() + floor, name


@torch.no_grad()
def test_single_precision_is_close_to_double(shared, model):
    assert relative_error(shared(images()), model.double()(images().double())) < 1e-4


@torch.no_grad()
def test_number_of_image_channels_is_free(name):
    model = build(name, in_chans=1, num_classes=3)
    assert model(images(channels=1)).shape == (2, 3)
