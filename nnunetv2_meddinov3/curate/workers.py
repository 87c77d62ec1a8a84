"""Three ways to ingest many sources: in turn, in processes of this machine, on a Dask cluster."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

from nnunetv2_meddinov3.curate.ingest import Job, Outcome, ingest, skipped
from nnunetv2_meddinov3.curate.volume import VolumeSource
from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.processes import one_thread_each, prepare_worker
from nnunetv2_meddinov3.signals import Stop

if TYPE_CHECKING:
    from distributed import Client
    from distributed import Future as DaskFuture

_POLL_SECONDS = 0.5  # how soon a signal is noticed while all processes are busy


def run_in_turn(sources: Sequence[VolumeSource], job: Job, stop: Stop) -> Iterator[Outcome]:
    """Ingest one source after the other in this process, until a signal came."""
    for source in sources:
        if stop.number is not None:
            return
        yield ingest(source, job)


def run_in_processes(
    sources: Sequence[VolumeSource], job: Job, workers: int, stop: Stop
) -> Iterator[Outcome]:
    """Ingest sources in spawned processes, each with one volume in memory at a time.

    A source that ends its process (out of memory, a crash in a reader) is skipped; those that were
    in the other processes at that moment are ingested again.
    """
    remaining = iter(sources)
    while lost := (yield from _run_pool(remaining, job, workers, stop)):
        for source in lost:
            if (yield from _run_pool(iter([source]), job, 1, stop)):
                reason = "ended the process that read it, out of memory perhaps"
                yield skipped(source.key, reason)


def _run_pool(
    sources: Iterator[VolumeSource], job: Job, workers: int, stop: Stop
) -> Generator[Outcome, None, list[VolumeSource]]:
    """Yield outcomes until the sources are through; return those of a pool that broke."""
    flying: dict[Future[Outcome], VolumeSource] = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _prepare_worker, (job,)) as pool:
        while True:
            while stop.number is None and len(flying) < 2 * workers:
                if (source := next(sources, None)) is None:
                    break
                try:
                    with one_thread_each():  # may start a process
                        flying[pool.submit(_ingest_in_worker, source)] = source
                except BrokenProcessPool:
                    return [*flying.values(), source]
            if stop.number is not None:
                flying = {future: name for future, name in flying.items() if not future.cancel()}
            if not flying:
                return []
            done, _ = wait(flying, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=lambda future: flying[future].key):
                if isinstance(future.exception(), BrokenProcessPool):
                    return list(flying.values())
                yield future.result()
                del flying[future]


_job: Job | None = None  # of this worker process


def _prepare_worker(job: Job) -> None:
    global _job
    _job = job
    prepare_worker()


def _ingest_in_worker(source: VolumeSource) -> Outcome:
    assert _job is not None
    return ingest(source, _job)


def run_on_dask(
    sources: Sequence[VolumeSource], job: Job, address: str, stop: Stop
) -> Iterator[Outcome]:
    """Ingest sources on a Dask cluster whose workers see the same folders.

    The sources of a worker that dies are ingested on another. A source that takes worker after
    worker with it is skipped.

    Raises:
        UserError: If Dask is not installed, no scheduler answers, or the store cannot be written.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise UserError(
            "--dask-scheduler needs the package distributed, which is not installed: install "
            "dask[distributed], or use --workers or --shard."
        ) from error
    try:
        client = Client(address, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--dask-scheduler must be the address of a running scheduler, but {address} does not "
            f"answer ({first_line(error)}): check it, as in tcp://host:8786."
        ) from error
    with client:
        # The result of a task and not scattered data, which would be lost with its last worker.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a large guard, which is sent only once
            shared = client.submit(_itself, job, pure=False)
        lost = yield from _run_tasks(client, sources, shared, stop)
        for source in lost:  # alone: Dask also blames what waited on the same workers
            if (yield from _run_tasks(client, [source], shared, stop)):
                reason = "ended the Dask workers that read it, out of memory perhaps"
                yield skipped(source.key, reason)


def _run_tasks(
    client: Client, sources: Sequence[VolumeSource], shared: DaskFuture, stop: Stop
) -> Generator[Outcome, None, list[VolumeSource]]:
    """Yield outcomes until the sources are through; return those whose workers died."""
    from distributed import KilledWorker, as_completed

    lost = []
    futures = {client.submit(ingest, source, shared, pure=False): source for source in sources}
    for future in as_completed(list(futures), loop=client.loop):
        if stop.number is not None:
            client.cancel([other for other in futures if not other.done()])
            return []
        failure = future.exception()
        if isinstance(failure, UserError):
            raise failure
        if isinstance(failure, KilledWorker):
            lost.append(futures[future])
        elif failure is not None:
            why = f"{type(failure).__name__}: {first_line(failure)}"
            yield skipped(futures[future].key, f"failed on its Dask worker ({why})")
        else:
            yield future.result()
    return lost


def _itself(job: Job) -> Job:
    return job
