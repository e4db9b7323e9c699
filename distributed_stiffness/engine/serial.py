"""The reference engine: every task in this process, one after the other, with no Ray."""

from __future__ import annotations

import torch

from distributed_stiffness.engine.job import Job
from distributed_stiffness.engine.lease import Lease
from distributed_stiffness.engine.prepare import Prepared
from distributed_stiffness.engine.replica import Replica
from distributed_stiffness.training import train

NAME = "this process"
MEMORY = 2 * 2**30  # bytes, where nothing is said


def run_serially(prepared: Prepared, lease: Lease) -> None:
    """Train, compute and check everything that the store lacks."""
    run = prepared.run
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    job = prepared.job(
        lease,
        memory=run.memory or MEMORY,
        device="cpu" if run.device == "auto" else run.device,
    )
    _train(job)
    _compute(job)
    job.finish()


def _train(job: Job) -> None:
    for run in job.runs_to_train():
        try:
            for event in train(job.study, run, job.data, job.folder, device=job.device):
                job.training_event(event)
        except Exception as error:
            job.training_ended(run, error)
        else:
            job.training_ended(run)


def _compute(job: Job) -> None:
    replica = Replica(
        job.study,
        job.data,
        job.plan,
        store=job.store.url,
        checkpoints=job.checkpoints,
        device=job.device,
    )
    if not job.scheduler.idle and (speed := replica.measure()) is not None:
        job.measured(speed, replicas=1)
    job.scheduler.replica_ready(NAME)
    while assignments := job.assign():
        for assignment in assignments:
            try:
                job.task_done(NAME, replica.run(assignment.task))
            except Exception as error:
                job.task_failed(NAME, assignment.task, error)
