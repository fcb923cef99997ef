"""The networks. `build_model` gives a classifier, `SupConResNet` the encoder of ST with its projection head."""

from models.resnet import MODELS, ResNet, SupConResNet, build_model, logits_of

__all__ = ["MODELS", "ResNet", "SupConResNet", "build_model", "logits_of"]
