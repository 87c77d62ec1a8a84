"""From a slice store to the micro-batches of each step, in the same order on any machine."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.pretrain.config import StageConfig
from nnunetv2_meddinov3.pretrain.intensity import check_store
from nnunetv2_meddinov3.pretrain.monitor.tracker import fixed_slices, spread_rows
from nnunetv2_meddinov3.pretrain.sampling import Group, Sampler
from nnunetv2_meddinov3.pretrain.views import Slices, make_views
from nnunetv2_meddinov3.pretrain.views.batch import ViewBatch, join
from nnunetv2_meddinov3.store import layout
from nnunetv2_meddinov3.store.reader import SliceStore


def open_store(config: StageConfig) -> tuple[SliceStore, np.ndarray]:
    """Open the store of a config and return the rows that are trained on.

    Raises:
        UserError: If there is none, it has no such part, or it cannot be trained on.
    """
    if not config.data.store:
        raise UserError("pretraining needs a slice store: give --store DIR (`meddinov3 curate`).")
    store = SliceStore(config.data.store)
    rows = np.arange(len(store))
    if config.data.part is not None:
        rows = _part(store, config.data.part)
    check_store(store, rows, config)
    return store, rows


def _part(store: SliceStore, name: str) -> np.ndarray:
    path = store.path / layout.SPLITS
    if not path.is_file():
        raise UserError(
            f"data.part={name} needs a split of the store, but {store.path} has none: make one "
            f"with `meddinov3 store split {store.path} {name}=0.9 rest=0.1`."
        )
    try:
        split = layout.unsealed(path.read_bytes(), "splits_sha256")
    except layout.Damaged as error:
        raise UserError(f"{path} {error}: split the store again.") from error
    if split["records_sha256"] != store.records_sha256:
        raise UserError(f"{path} must be of the store as it is, but is older: split it again.")
    if name not in split["rows"]:
        raise UserError(f"data.part must be one of {', '.join(split['rows'])}, got {name}.")
    return np.array(split["rows"][name], dtype=np.int64)


def slices_to_follow(store: SliceStore, rows: np.ndarray, config: StageConfig) -> Tensor:
    """Return a few slices of different volumes, (n, 1, H, W) in HU, the same for every run.

    Raises:
        UserError: If one cannot be read.
    """
    chosen = spread_rows(_volumes(store, rows), store.rows["body_fraction"].to_numpy()[rows])
    images = [store[int(rows[place])][0] for place in chosen]
    return fixed_slices(images, tuple(config.intensity.clip_hu))


def _volumes(store: SliceStore, rows: np.ndarray) -> np.ndarray:
    """Return the number of each row's volume."""
    names = pc.dictionary_encode(store.rows["volume_id"].cast("string")).combine_chunks()
    return np.asarray(names.indices)[rows]


class _Failure(str):
    """A user's mistake met by a worker, which would arrive wrapped in a traceback."""


class _Groups(Dataset):
    """Reads the slices of a group and, if asked, makes its views."""

    def __init__(self, store: SliceStore, config: StageConfig, makes_views: bool) -> None:
        self.store, self.config, self.makes_views = store, config, makes_views

    def __getitem__(self, group: Group) -> tuple[Group, Slices | ViewBatch] | _Failure:
        try:
            slices = Slices.of([self.store[row][0] for row in group.rows])
        except UserError as error:
            return _Failure(error)
        return group, _views(slices, group, self.config) if self.makes_views else slices


def _views(slices: Slices, group: Group, config: StageConfig) -> ViewBatch:
    return make_views(slices, config.crops.resolutions[group.resolution], config, group.seed)


class SliceLoader:
    """The micro-batches of this rank, step after step.

    What a step sees depends on seed, stage and step alone. The groups of a step are dealt to the
    ranks in their order, so several ranks see together what one would see.

    Args:
        store: The slices.
        rows: Of the store.
        config: Of the stage.
        rank: Of this process.
        world_size: Number of processes.
        device: Where the views are wanted.
    """

    def __init__(
        self,
        store: SliceStore,
        rows: np.ndarray,
        config: StageConfig,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.sampler, self.config, self.device = (
            Sampler(rows, _volumes(store, rows), config),
            config,
            device,
        )
        self.rank, self.world_size = rank, world_size
        on_device = config.data.views_on == "device" or (
            config.data.views_on == "auto" and device.type == "cuda"
        )
        self._dataset = _Groups(store, config, makes_views=not on_device)
        self._pinned = device.type == "cuda"

    def iterate(self, start_step: int = 0) -> Iterator[list[ViewBatch]]:
        """Yield the micro-batches of each step up to the last, on the device.

        Raises:
            UserError: If a slice cannot be read.
        """
        groups = self._groups_of_rank()
        per_batch = self._groups_per_micro_batch(len(groups))
        with contextlib.closing(_Items(self._open(start_step))) as items:
            for _ in range(start_step, self.config.optim.steps):
                made = [self._ready(items.next()) for _ in groups]
                yield [join(made[i : i + per_batch]) for i in range(0, len(made), per_batch)]

    def _groups_of_rank(self) -> range:
        n = self.sampler.groups_per_step // self.world_size
        return range(self.rank * n, (self.rank + 1) * n)

    def _groups_per_micro_batch(self, groups: int) -> int:
        micro = self.config.engine.micro_batch
        return groups if micro is None else max(1, micro // self.sampler.size)

    def _open(self, start_step: int) -> DataLoader:
        data = self.config.data
        return DataLoader(
            self._dataset,
            batch_size=None,
            sampler=_Order(
                self.sampler, start_step, self.config.optim.steps, self._groups_of_rank()
            ),
            num_workers=data.workers,
            prefetch_factor=data.prefetch if data.workers else None,
            pin_memory=self._pinned,
            worker_init_fn=_leave_signals_to_the_main_process,
            generator=torch.Generator(),  # else it draws from the global one
        )

    def _ready(self, item: Any) -> ViewBatch:
        if isinstance(item, _Failure):
            raise UserError(str(item))
        group, content = item
        if isinstance(content, ViewBatch):
            return content.to(self.device)
        return _views(content.to(self.device), group, self.config).to(self.device)


def _leave_signals_to_the_main_process(_worker: int) -> None:
    """Ignore what ends a run, in a worker.

    SLURM and systemd signal every process of a job. The main one finishes its step and saves,
    which takes workers that live; they end with ``_Items.close``, or when the main one is gone.
    """
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        if number := getattr(signal, name, None):  # Windows lacks SIGUSR1
            signal.signal(number, signal.SIG_IGN)


class _Order:
    """The groups of a rank from a step on; an iterable that a DataLoader takes as its sampler."""

    def __init__(self, sampler: Sampler, start: int, stop: int, groups: range) -> None:
        self.sampler, self.steps, self.groups = sampler, range(start, stop), groups

    def __iter__(self) -> Iterator[Group]:
        for step in self.steps:
            for index in self.groups:
                yield self.sampler.group(step, index)

    def __len__(self) -> int:
        return len(self.steps) * len(self.groups)


class _Items:
    """The items of a DataLoader, whose workers end with ``close``."""

    def __init__(self, loader: DataLoader) -> None:
        self._iterator = iter(loader)

    def next(self) -> Any:
        return next(self._iterator)

    def close(self) -> None:
        if shutdown := getattr(self._iterator, "_shutdown_workers", None):
            shutdown()
            for worker in self._iterator._workers:
                if worker.is_alive():  # stuck, and deaf to the SIGTERM it was sent
                    worker.kill()
