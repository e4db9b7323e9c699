"""Networks: the paper's, and any `package.module:factory`."""

from distributed_stiffness.models.catalogue import MODELS, build, check_outputs
from distributed_stiffness.models.cnn import cnn
from distributed_stiffness.models.fully_connected import fully_connected
from distributed_stiffness.models.resnet import ResNet, resnet18, resnet20

__all__ = [
    "MODELS",
    "ResNet",
    "build",
    "check_outputs",
    "cnn",
    "fully_connected",
    "resnet18",
    "resnet20",
]
