"""Errors that a user can mend.

Each message has three parts: what was wrong (name and value), what was expected, what to do.
The command line prints them without a traceback; anything else that is raised is our bug.
"""


class StiffnessError(Exception):
    """Base of every error that a user can mend."""


class StudyError(StiffnessError, ValueError):
    """A study asks for something that does not exist or makes no sense."""


class DataError(StiffnessError, ValueError):
    """Examples or labels are missing, broken, or not what the study says."""


class ModelError(StiffnessError, ValueError):
    """A network cannot be built, or does not fit its data."""


class CheckpointError(StiffnessError, ValueError):
    """A checkpoint from elsewhere cannot be found, placed, read, or does not fit the network."""


class GradientError(StiffnessError, RuntimeError):
    """Per-example gradients are not defined, not finite, or fail the self-check."""


class TrainingError(StiffnessError, RuntimeError):
    """Training went wrong: the message names the step, the learning rate and the seed."""


class StoreError(StiffnessError, RuntimeError):
    """A store cannot be created, read, written or continued."""


class ClusterError(StiffnessError, RuntimeError):
    """The Ray cluster cannot run what the study asks for."""
