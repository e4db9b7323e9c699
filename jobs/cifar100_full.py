"""CIFAR-100, every pair of all 10,000 validation images: classes and super-classes."""

from distributed_stiffness.cli import job
from distributed_stiffness.study import Data, Model, Study, Training

STUDY = Study(
    title="CIFAR-100, all 10,000 validation images",
    data=Data(name="cifar100", validation_examples=None),
    model=Model(name="resnet20"),
    training=Training(learning_rates=(1e-3,), epochs=30),
)

if __name__ == "__main__":
    job(STUDY, store="results/cifar100_full.zarr", description=__doc__)
