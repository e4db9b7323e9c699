"""CIFAR-10 with the paper's CNN: class matrices at four stages (v1, Figure 6)."""

from distributed_stiffness.cli import job
from distributed_stiffness.study import Data, Model, Study, Training

STUDY = Study(
    title="CIFAR-10, CNN",
    data=Data(name="cifar10", validation_examples=500),
    model=Model(name="cnn"),
    training=Training(learning_rates=(3e-4, 1e-3), epochs=50),
)

if __name__ == "__main__":
    job(STUDY, store="results/cifar10.zarr", description=__doc__)
