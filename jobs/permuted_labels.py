"""MNIST with its training labels permuted at random: nothing to generalise (v1, Figure 4)."""

from distributed_stiffness.cli import job
from distributed_stiffness.study import Data, Model, Study, Training

STUDY = Study(
    title="MNIST, permuted training labels",
    data=Data(name="mnist", validation_examples=500, permuted_labels=1.0),
    model=Model(name="fully_connected"),
    training=Training(learning_rates=(3e-4, 1e-3, 3e-3), epochs=20),
)

if __name__ == "__main__":
    job(STUDY, store="results/permuted_labels.zarr", description=__doc__)
