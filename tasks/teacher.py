"""Networks that teach another one: found by name, frozen, asked for scores of images and of positions."""

from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import get_pretrained_cfg, is_model
from torch import Tensor, nn

from data.registry import CLASSIFICATION
from models import create_model
from models.pretrained import has_averaged_weights, load_pretrained
from utils.checkpoint_files import fetch, is_url, load_file
from utils.spelling import nearest

_TIMM = "timm:"


class Teacher:
    """A network in eval mode and without gradients, which no wrapper, optimizer or checkpoint sees.

    It gets the student's batch as it is: augmented, and normalised by DATA.MEAN and DATA.STD. A teacher that
    was trained with other statistics sees other colours than it knows.

    Args:
        network: on its device; its parameters are frozen.
        size: side in pixels that images are resized to before the teacher sees them; 0 leaves them.
    """

    def __init__(self, network: nn.Module, size: int = 0) -> None:
        self.network = network.eval().requires_grad_(False)
        self.size = size

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> scores (B, K) in float32."""
        return self.network(self._resized(images)).float()

    @torch.no_grad()
    def token_logits(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Images (B, C, H, W) -> what the classifier says of each position alone, (B, h, w, K) in float32.

        Of a network that classifies the mean of its positions with one linear layer, the mean over its own
        positions is its prediction. A class token's classifier reads the patches in its place, as LV-ViT
        does it. Scores of another grid are resized to `grid`.

        Raises:
            ValueError: the network has no scores per position (it drops tokens, or has no such halves).
        """
        positions = self._positions(self._resized(images))
        scores = self.network.forward_head(positions.flatten(0, 2)).float()
        scores = scores.unflatten(0, positions.shape[:3])  # B h w K
        if tuple(positions.shape[1:3]) == tuple(grid):
            return scores
        scores = F.interpolate(
            scores.permute(0, 3, 1, 2), size=grid, mode="bilinear", antialias=True
        )
        return scores.permute(0, 2, 3, 1)

    def _positions(self, images: Tensor) -> Tensor:
        """The last features, (B, h, w, ...): at each position what the classifier takes for an image.

        That is a map of one pixel, (C, 1, 1) or (1, 1, C), or a sequence of equal tokens (n, C).
        """
        network = self.network
        try:
            features = network.forward_features(images)
            width, info = network.num_features, list(network.feature_info)[-1]
        except (AttributeError, NotImplementedError) as error:
            raise ValueError(self._unsuitable("it has no forward_features as in timm")) from error
        stride = info["stride"] if "stride" in info else info["reduction"]  # timm's word for it
        grid = tuple(-(-side // stride) for side in images.shape[2:])
        shape = tuple(features.shape[1:])
        if shape == (*grid, width):
            return features[..., None, None, :]
        if shape == (width, *grid):
            return features.permute(0, 2, 3, 1)[..., None, None]
        special = shape[0] - grid[0] * grid[1]
        if len(shape) == 2 and shape[1] == width and special >= 0:
            patches = features[:, special:].unflatten(1, grid)
            # A copy for each special token, and one for networks that classify the mean of the patches.
            return patches[..., None, :].expand(-1, -1, -1, special + 1, -1)
        raise ValueError(
            self._unsuitable(
                f"its features of {tuple(images.shape[2:])} pixels are {shape}, which is no map of "
                f"{width} channels and stride {stride}, and no such sequence of tokens"
            )
        )

    def _unsuitable(self, reason: str) -> str:
        return (
            f"TRAIN.TOKEN_LABELS.TEACHER: {type(self.network).__name__} gives no scores per position: "
            f"{reason}; choose a network that classifies a map or tokens, such as deit or dilateformer"
        )

    def _resized(self, images: Tensor) -> Tensor:
        size = (self.size, self.size)
        if not self.size or tuple(images.shape[2:]) == size:
            return images
        return F.interpolate(images, size=size, mode="bicubic", antialias=True)


def load_teacher(
    section: str,
    name: str,
    weights: str,
    *,
    num_classes: int,
    in_chans: int = 3,
    device: torch.device | None = None,
) -> nn.Module:
    """The network `name` with its weights, on `device`; draws no random number of the caller's.

    Args:
        section: config section of the keys TEACHER and TEACHER_WEIGHTS, for messages.
        name: a variant (`models.list_models()`), the YAML file of one or of a run, or timm:NAME.
        weights: a checkpoint, whose averaged weights are taken if it has some. timm's models do without:
            theirs are then the published ones, fetched by timm.
        num_classes: classes of the student, which the teacher must know.
        device: None only looks whether it can be had (a URL is left to the run), and returns it without
            memory of its own.

    Raises:
        ValueError: there is no such network or file, or it has other classes; says what to set.
    """
    if not name:
        raise ValueError(
            f"{section}.TEACHER is empty: name a variant such as 'deit_small_patch16_224', the YAML file of "
            "one or of a run, or a model of timm such as 'timm:regnety_160'"
        )
    is_timm = name.startswith(_TIMM)
    if is_timm:
        _check_timm(section, name, weights, num_classes)
    elif not weights:
        raise ValueError(
            f"{section}.TEACHER_WEIGHTS is empty: {section}.TEACHER='{name}' has not learnt anything yet; "
            "name a checkpoint"
        )
    if weights and not is_url(weights) and not Path(weights).is_file():
        raise ValueError(f"{section}.TEACHER_WEIGHTS='{weights}' does not exist")
    sizes = dict(num_classes=num_classes, in_chans=in_chans)
    if device is None:
        with torch.device("meta"):
            network = _build(section, name, False, sizes)
    else:
        with torch.random.fork_rng(devices=[]):
            network = _build(section, name, is_timm and not weights, sizes)
    if weights and not (device is None and is_url(weights)):
        content = load_file(fetch(weights), mapped=device is None)
        try:
            load_pretrained(
                network,
                content,
                name=weights,
                use_ema=has_averaged_weights(content),
                new_head=False,
            )
        except ValueError as error:
            raise ValueError(
                f"{section}.TEACHER='{name}' must have the student's {num_classes} classes and "
                f"{in_chans} channels, and be what TEACHER_WEIGHTS is of: {error}"
            ) from error
    return network if device is None else network.to(device)


def _build(section: str, name: str, pretrained: bool, sizes: dict[str, int]) -> nn.Module:
    """The network with fresh weights, or with timm's published ones."""
    if not name.startswith(_TIMM):
        try:
            network = create_model(name, **sizes)
        except (ValueError, OSError) as error:
            raise ValueError(f"{section}.TEACHER='{name}': {error}") from error
        if network.task != CLASSIFICATION:
            raise ValueError(
                f"{section}.TEACHER='{name}' is a model for {network.task}: name a classifier, whose scores "
                "of images can be learnt"
            )
        return network
    try:
        return timm.create_model(name.removeprefix(_TIMM), pretrained=pretrained, **sizes)
    except OSError as error:  # those of urllib and of the hub are OSErrors
        raise ValueError(
            f"{section}.TEACHER='{name}': its published weights cannot be fetched ({error}); name a file "
            f"by {section}.TEACHER_WEIGHTS"
        ) from error


def _check_timm(section: str, name: str, weights: str, num_classes: int) -> None:
    """ValueError unless timm has the model, and weights of it for these classes if no file is named."""
    model = name.removeprefix(_TIMM)
    if not is_model(model):
        close = nearest(model, timm.list_models())[:3]
        raise ValueError(
            f"{section}.TEACHER='{name}': timm has no such model; perhaps one of {close}"
        )
    if weights:
        return
    try:
        published = get_pretrained_cfg(model)
    except RuntimeError as error:  # no such tag
        raise ValueError(f"{section}.TEACHER='{name}': {error}") from error
    if published is None or not published.has_weights:
        raise ValueError(
            f"{section}.TEACHER='{name}': timm has no weights of it; name a file by "
            f"{section}.TEACHER_WEIGHTS"
        )
    if published.num_classes != num_classes:
        raise ValueError(
            f"{section}.TEACHER='{name}': its published weights are for {published.num_classes} classes, "
            f"the student has {num_classes}; fine-tune it on this data, and name the file by "
            f"{section}.TEACHER_WEIGHTS"
        )


def build_teacher(
    config: Any, section: str, num_classes: int, device: torch.device | None = None
) -> Teacher:
    """The teacher that TRAIN.<section> names; without a device it can be checked, not run."""
    options = config.TRAIN[section]
    network = load_teacher(
        f"TRAIN.{section}",
        options.TEACHER,
        options.TEACHER_WEIGHTS,
        num_classes=num_classes,
        in_chans=config.MODEL.IN_CHANS,
        device=device,
    )
    return Teacher(network, options.TEACHER_SIZE)
