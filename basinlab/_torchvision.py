"""Let torchvision import beside a torch of another build: declare the two operators that its import asks for."""

import sys
from importlib import import_module

import torch

_DECLARED = torch.library.Library("torchvision", "FRAGMENT")


def ensure_importable() -> None:
    try:
        import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in ("nms", "qnms"):
            _DECLARED.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [module for module in sys.modules if module.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        import_module("torchvision")
