"""Fashion-MNIST with the paper's fully connected net: four stages (v1, Figure 5)."""

from distributed_stiffness.cli import job
from distributed_stiffness.study import Data, Model, Study, Training

STUDY = Study(
    title="Fashion-MNIST, fully connected net",
    data=Data(name="fashion_mnist", validation_examples=500),
    model=Model(name="fully_connected"),
    training=Training(learning_rates=(3e-4, 1e-3, 3e-3), epochs=20),
)

if __name__ == "__main__":
    job(STUDY, store="results/fashion_mnist.zarr", description=__doc__)
