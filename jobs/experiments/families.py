"""A small CNN of each of many families in timm."""

from __future__ import annotations

FAMILIES = (
    *("resnet50d", "seresnet50", "res2net50_26w_4s", "resnest14d", "skresnet18", "nf_resnet26"),
    *("efficientnet_b0", "tf_efficientnet_b0", "tinynet_a", "mixnet_s", "rexnet_100"),
    *("mobilenetv4_conv_small", "mobileone_s0", "ghostnet_100", "lcnet_100", "hardcorenas_a"),
    *("regnety_004", "repvgg_a0", "dla34", "hrnet_w18_small", "cspdarknet53", "darknet53"),
    *("densenet121", "dpn68", "ese_vovnet19b_dw", "selecsls42b", "xception41", "vgg11_bn"),
    *("convnextv2_atto", "poolformer_s12", "inception_next_atto", "efficientvit_b0"),
    *("edgenext_xx_small", "fastvit_t8"),
)
