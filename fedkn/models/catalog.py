"""Every architecture by name. To add one: a builder in a file of its own, and a line here."""

from __future__ import annotations

from fedkn.models.convnet3 import convnet3
from fedkn.models.densenet import densenet20x16, densenet121
from fedkn.models.knresnet import knresnet18, knresnet34, knresnet50
from fedkn.models.lenet import cnn_cifar, lenet
from fedkn.models.mobilenet import mobilenet_v2
from fedkn.models.preact_resnet import knresnet13, preact_resnet18
from fedkn.models.resnet import resnet18, resnet34, resnet50
from fedkn.models.resnet8 import resnet8
from fedkn.models.simple_cnn import simple_cnn
from fedkn.models.spec import Architecture
from fedkn.models.vgg import vgg6

__all__ = ["ARCHITECTURES"]

_TMLR = "Nasirigerdeh et al., TMLR 2024, arXiv 2205.10089"
_SATML = "Nasirigerdeh et al., SaTML 2023, arXiv 2210.00053"
_RESNET = "He et al., CVPR 2016, arXiv 1512.03385"
_PREACT = "He et al., ECCV 2016, arXiv 1603.05027"
_DENSE = "Huang et al., CVPR 2017, arXiv 1608.06993"
_FEDAVG = "after the CNN of McMahan et al., AISTATS 2017, arXiv 1602.05629"
_HYBRID = "code of Chen et al., ICML 2025, arXiv 2505.21877"
_NIID = "Li et al., ICDE 2022, arXiv 2102.02079, after LeCun et al. 1998"
_SKEWED = "code of Zhang et al., TMLR 2024, arXiv 2308.09565"
_MOBILE = "Sandler et al., CVPR 2018, arXiv 1801.04381"

# Builder, paper, width, final norm, dropout of KernelNorm and of the KernelNorm at the end. A
# kernel-normalized original shares its builder with its plain counterpart where they differ in
# nothing but the normalizer and its final norm.
ARCHITECTURES: dict[str, Architecture] = {
    "resnet8": Architecture(resnet8, _SATML, 64, "none", 0.1, 0.25, ("low",)),
    "resnet18": Architecture(resnet18, _RESNET, 64, "none", 0.05, 0.25),
    "resnet34": Architecture(resnet34, _RESNET, 64, "none", 0.05, 0.25),
    "resnet50": Architecture(resnet50, _RESNET, 64, "none", 0.05, 0.25),
    "preact_resnet18": Architecture(preact_resnet18, _PREACT, 64, "own", 0.1, 0.5),
    "densenet20x16": Architecture(densenet20x16, _SATML, 32, "own", 0.1, 0.5, ("low",)),
    "densenet121": Architecture(densenet121, _DENSE, 64, "own", 0.05, 0.25),
    "convnet3": Architecture(convnet3, _FEDAVG, 32, "none", 0.1, 0.25, ("low",)),
    "simple_cnn": Architecture(simple_cnn, _HYBRID, 16, "none", 0.1, 0.25, ("low",)),
    "cnn_cifar": Architecture(cnn_cifar, _SKEWED, 64, "none", 0.1, 0.25, ("low",)),
    "lenet": Architecture(lenet, _NIID, 6, "none", 0.1, 0.25, ("low",)),
    "vgg6": Architecture(vgg6, _TMLR, 64, "none", 0.1, 0.25, ("low",)),
    "mobilenet_v2": Architecture(mobilenet_v2, _MOBILE, 32, "none", 0.05, 0.25),
    "knresnet8": Architecture(resnet8, _SATML, 64, "own", 0.1, 0.25, ("low",)),
    "knresnet13": Architecture(knresnet13, _SATML, 64, "own", 0.1, 0.5, ("low",)),
    "knresnet18": Architecture(knresnet18, _TMLR, 64, "own", 0.05, 0.25),
    "knresnet34": Architecture(knresnet34, _TMLR, 64, "own", 0.05, 0.25),
    "knresnet50": Architecture(knresnet50, _TMLR, 256, "own", 0.05, 0.25),
    "kndensenet20x16": Architecture(densenet20x16, _SATML, 32, "own", 0.1, 0.5, ("low",)),
}
