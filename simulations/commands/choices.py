"""The names that options may take, for their help: reading it needs no torch, which takes seconds.

A test holds them to what there is (tests/simulations/commands/test_help.py).
"""

from __future__ import annotations

from pkgutil import iter_modules

import fedkn

__all__ = ["MODELS", "NORMALIZERS", "OWN", "PARTITIONS", "SOURCES", "STRATEGIES", "TASKS"]

NORMALIZERS = (
    "none, batch, group, layer, instance, ws_group, kernel, sws, frn, evonorm_s, rms, lcn, brn, "
    "feature_norm, fedbn, silobn, fixbn, fbn, hbn, nf, fedwon, anfr, ws_kernel, dyt, proxy, ghost, "
    "bcn, online, mabn, fixup"
)
MODELS = (
    "resnet8, resnet18, resnet34, resnet50, preact_resnet18, densenet20x16, densenet121, "
    "convnet3, simple_cnn, cnn_cifar, lenet, vgg6, mobilenet_v2, knresnet8, knresnet13, "
    "knresnet18, knresnet34, knresnet50, kndensenet20x16"
)
SOURCES = (
    "digits, digits_domains, mnist, fashion_mnist, emnist, cifar10, cifar100, image_folder, "
    "client_folders, arrays, huggingface"
)
_ALGORITHMS = sorted(file.name for file in iter_modules([f"{fedkn.__path__[0]}/algorithms"]))
STRATEGIES = ", ".join(_ALGORITHMS) + (
    ", fedavgm, fedadam, fedyogi, fedadagrad, qfedavg, fedmedian, fedtrimmedavg, krum, multikrum, "
    "bulyan"
)
TASKS = "classification, multilabel, regression, segmentation"
PARTITIONS = "iid, dirichlet, shards, quantity, labels, natural, domains"
OWN = "or your own: package.module:NAME"
