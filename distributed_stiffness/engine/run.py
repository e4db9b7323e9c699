"""From a study to a finished store."""

from __future__ import annotations

from collections.abc import Callable

from distributed_stiffness.engine.lease import Lease
from distributed_stiffness.engine.prepare import Prepared, Run, prepare
from distributed_stiffness.engine.serial import run_serially
from distributed_stiffness.gradients.surroundings import in_fresh_surroundings
from distributed_stiffness.paths import Location
from distributed_stiffness.progress import Progress
from distributed_stiffness.study import Study


@in_fresh_surroundings
def run_study(
    study: Study,
    run: Run | Location,
    progress: Progress | None = None,
    *,
    bring: Callable[[Prepared], None] | None = None,
) -> str:
    """Compute everything that the store lacks; return the store's path or URL.

    Run it again after any interruption: it computes what is missing, and nothing else. `bring` puts
    checkpoints that were trained elsewhere in place, once everything else is known to fit. `run`
    may be the store's path or URL alone.

    Raises:
        StiffnessError: whatever a user can mend, before costly work where that is possible.
        StudyFailed: a part could not be computed; all else is in the store.
    """
    run = Run.of(run)
    if progress is None:
        with Progress(quiet=run.quiet) as progress:
            return run_study(study, run, progress, bring=bring)
    run.require_writable()
    prepared = prepare(study, run, progress)
    if bring is not None:
        bring(prepared)
    with Lease(run.store_url).held(progress) as lease:
        if run.engine == "serial":
            run_serially(prepared, lease)
        else:
            from distributed_stiffness.engine.ray import run_on_ray  # only here: imports ray

            run_on_ray(prepared, lease)
    return run.store_url
