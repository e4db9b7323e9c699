"""MNIST with the paper's fully connected net: class matrices at four stages (v1, Figure 3)."""

from distributed_stiffness.cli import job
from distributed_stiffness.study import Data, Model, Study, Training

STUDY = Study(
    title="MNIST, fully connected net",
    data=Data(name="mnist", validation_examples=500),
    model=Model(name="fully_connected"),
    training=Training(learning_rates=(3e-4, 1e-3, 3e-3), epochs=20),
)

if __name__ == "__main__":
    job(STUDY, store="results/mnist.zarr", description=__doc__)
