"""Cascade R-CNN: three stages, each trained on what the one before has moved, for ever stricter overlaps.

Paper:      arXiv:1712.00726, Sec. 4 (stages, box statistics, classes averaged at test); arXiv:1906.09756,
            Sec. 5 (a mask head in each stage)
Reference:  mmdet 2, configs/_base_/models/cascade_mask_rcnn_r50_fpn.py and CascadeRoIHead
Deviations: the paper averages probabilities of the stages, here logits are averaged as in the reference, and
            masks from all stages as there.
"""

from .rcnn import Stage, TwoStageHead
from .registry import register_head


@register_head("cascade_rcnn", task="detection")
class CascadeRCNNHead(TwoStageHead):
    """Three stages, one box per proposal."""

    stages = (
        Stage(iou=0.5, weights=(10.0, 10.0, 5.0, 5.0), loss_weight=1.0),
        Stage(iou=0.6, weights=(20.0, 20.0, 10.0, 10.0), loss_weight=0.5),
        # Standard deviations 0.033 and 0.067, as rounded in the reference.
        Stage(iou=0.7, weights=(1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067), loss_weight=0.25),
    )
    class_agnostic = True
    smooth_l1_beta = 1.0
    rpn_smooth_l1_beta = 1 / 9


@register_head("cascade_mask_rcnn", task="detection")
class CascadeMaskRCNNHead(CascadeRCNNHead):
    """Cascade R-CNN with a mask head in each stage."""

    needs_masks = True
