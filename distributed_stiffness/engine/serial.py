"""The reference engine: every task in this process, one after the other, with no Ray."""

from __future__ import annotations

import torch

from distributed_stiffness.engine.job import Job
from distributed_stiffness.engine.replica import Replica
from distributed_stiffness.training import train

NAME = "this process"


def run_serially(job: Job) -> None:
    """Train, compute and check everything that the store of `job` lacks."""
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    for run in job.runs_to_train():
        try:
            for event in train(job.study, run, job.data, job.folder, device=job.device):
                job.training_event(event)
        except Exception as error:
            job.training_ended(run, error)
        else:
            job.training_ended(run)
    replica = Replica(
        job.study,
        job.data,
        job.plan,
        store=job.store.url,
        checkpoints=job.checkpoints,
        device=job.device,
    )
    job.scheduler.replica_ready(NAME)
    while assignments := job.assign():
        for assignment in assignments:
            try:
                job.task_done(NAME, replica.run(assignment.task))
            except Exception as error:
                job.task_failed(NAME, assignment.task, error)
