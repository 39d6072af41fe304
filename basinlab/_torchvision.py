"""Let torchvision import beside a torch of another build: declare the two operators that its import asks for."""

import sys
from importlib import import_module

import torch

try:
    import_module("torchvision")
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    DECLARED = torch.library.Library("torchvision", "FRAGMENT")  # they are there as long as it is
    for name in ("nms", "qnms"):
        DECLARED.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [module for module in sys.modules if module.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    import_module("torchvision")
