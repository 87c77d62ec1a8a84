"""Three ways to bring many sources into a store: in turn, in processes, on a Dask cluster."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from nnunetv2_meddinov3.curate.ingest import Job, Outcome, enter, skip
from nnunetv2_meddinov3.curate.volume import VolumeSource
from nnunetv2_meddinov3.errors import UserError

# One thread each: the processes share the cores, and thread pools would fight over them.
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_POLL_SECONDS = 0.5  # how soon a signal is noticed while all processes are busy


def run_in_turn(
    sources: Sequence[VolumeSource], job: Job, stopped: Callable[[], bool]
) -> Iterator[Outcome]:
    """Enter one source after the other in this process, until told to stop."""
    for source in sources:
        if stopped():
            return
        yield enter(source, job)


def run_in_processes(
    sources: Sequence[VolumeSource], job: Job, workers: int, stopped: Callable[[], bool]
) -> Iterator[Outcome]:
    """Enter sources in spawned processes, each with one volume in memory at a time.

    A source that ends its process (out of memory, a crash in a reader) is skipped; those that were
    in the other processes at that moment are entered again.
    """
    remaining = iter(sources)
    while lost := (yield from _run_pool(remaining, job, workers, stopped)):
        for source in lost:
            if (yield from _run_pool(iter([source]), job, 1, stopped)):
                yield skip(source.key, "ended the process that read it, out of memory perhaps", job)


def _run_pool(
    sources: Iterator[VolumeSource], job: Job, workers: int, stopped: Callable[[], bool]
) -> Generator[Outcome, None, list[VolumeSource]]:
    """Yield outcomes until the sources are through; return those of a pool that broke."""
    flying: dict[Future, VolumeSource] = {}
    with (
        _environment(dict.fromkeys(_ONE_THREAD, "1")),
        ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _prepare_worker, (job,)
        ) as pool,
    ):
        while True:
            while not stopped() and len(flying) < 2 * workers:
                if (source := next(sources, None)) is None:
                    break
                try:
                    flying[pool.submit(_enter_in_worker, source)] = source
                except BrokenProcessPool:
                    return [*flying.values(), source]
            if stopped():
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
    # Ctrl-C and a scheduler's signal reach the whole group; the parent decides what is finished.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _enter_in_worker(source: VolumeSource) -> Outcome:
    return enter(source, _job)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Variables of processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def run_on_dask(
    sources: Sequence[VolumeSource], job: Job, address: str, stopped: Callable[[], bool]
) -> Iterator[Outcome]:
    """Enter sources on a Dask cluster whose workers see the same folders.

    Raises:
        UserError: If Dask is not installed or no scheduler answers.
    """
    try:
        from distributed import Client, as_completed
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
            f"answer ({error}): check it, as in tcp://host:8786."
        ) from error
    with client:
        shared = client.scatter(job, broadcast=True, hash=False)
        names = {client.submit(enter, source, shared, pure=False): source for source in sources}
        for future in as_completed(list(names), loop=client.loop):
            if stopped():
                client.cancel([other for other in names if not other.done()])
                return
            error = future.exception()
            if isinstance(error, UserError):
                raise error
            if error is not None:
                yield skip(names[future].key, f"failed on its Dask worker ({error})", job)
            else:
                yield future.result()
