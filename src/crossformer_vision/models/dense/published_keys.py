"""Keys of OpenMMLab's dense models, as pairs of a pattern and its replacement with this package's key."""

# Keys of OpenMMLab's FPN, and those of a `BackboneWithFPN` called "backbone".
NECK_KEYS = [
    (r"^neck\.lateral_convs\.(\d)\.conv\.", r"backbone.fpn.inner_blocks.\1.0."),
    (r"^neck\.fpn_convs\.(\d)\.conv\.", r"backbone.fpn.layer_blocks.\1.0."),
]

RETINANET_KEYS = [
    (r"^neck\.fpn_convs\.3\.conv\.", "backbone.fpn.extra_blocks.p6."),
    (r"^neck\.fpn_convs\.4\.conv\.", "backbone.fpn.extra_blocks.p7."),
    *NECK_KEYS,
    (r"^bbox_head\.cls_convs\.(\d)\.conv\.", r"head.classification_head.conv.\1.0."),
    (r"^bbox_head\.reg_convs\.(\d)\.conv\.", r"head.regression_head.conv.\1.0."),
    (r"^bbox_head\.retina_cls\.", "head.classification_head.cls_logits."),
    (r"^bbox_head\.retina_reg\.", "head.regression_head.bbox_reg."),
]
MASK_RCNN_KEYS = [
    *NECK_KEYS,
    (r"^rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."),
    (r"^rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
    (r"^rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
    (r"^roi_head\.bbox_head\.shared_fcs\.0\.", "roi_heads.box_head.fc6."),
    (r"^roi_head\.bbox_head\.shared_fcs\.1\.", "roi_heads.box_head.fc7."),
    (r"^roi_head\.bbox_head\.fc_cls\.", "roi_heads.box_predictor.cls_score."),
    (r"^roi_head\.bbox_head\.fc_reg\.", "roi_heads.box_predictor.bbox_pred."),
    (r"^roi_head\.mask_head\.convs\.(\d)\.conv\.", r"roi_heads.mask_head.\1.0."),
    (r"^roi_head\.mask_head\.upsample\.", "roi_heads.mask_predictor.conv5_mask."),
    (r"^roi_head\.mask_head\.conv_logits\.", "roi_heads.mask_predictor.mask_fcn_logits."),
]

# OpenMMLab's names of the layers in the heads. Names of the modules are the same here.
SEGMENTER_HEAD_KEYS = [
    (r"^decode_head\.conv_seg\.", "head.conv_seg."),
    (r"^decode_head\.(.+)\.conv\.", r"head.\1.0."),
    (r"^decode_head\.(.+)\.bn\.", r"head.\1.1."),
    (r"^auxiliary_head\.(.+)\.conv\.", r"auxiliary_head.\1.0."),
    (r"^auxiliary_head\.(.+)\.bn\.", r"auxiliary_head.\1.1."),
]
