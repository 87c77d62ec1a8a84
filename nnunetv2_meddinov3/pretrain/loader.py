"""From a slice store to the micro-batches of each step, in the same order on any machine.

Which slices a step sees is a function of seed, stage and step, whatever rank or worker asks.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import weakref
from collections.abc import Generator, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from torch.utils.data import DataLoader, Dataset

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.pretrain.config import StageConfig
from nnunetv2_meddinov3.pretrain.intensity import (
    check_store,
    rows_of_kinds,
    said_of_values,
    with_kinds,
)
from nnunetv2_meddinov3.pretrain.monitor.tracker import FixedSlices, fixed_slices, spread_rows
from nnunetv2_meddinov3.pretrain.views import Slices, make_views
from nnunetv2_meddinov3.pretrain.views.batch import ViewBatch, join
from nnunetv2_meddinov3.pretrain.views.photometric import Ends
from nnunetv2_meddinov3.signals import leave_stopping_to_the_parent
from nnunetv2_meddinov3.store import layout
from nnunetv2_meddinov3.store.reader import SliceStore
from nnunetv2_meddinov3.store.records import NEAR_EXCLUDED

# the last number of a seed says what is drawn, so that nothing is drawn twice
_EPOCH, _RESOLUTION, _VIEWS = range(3)


def open_store(config: StageConfig) -> tuple[SliceStore, np.ndarray]:
    """Open the store of a config and return the rows that are trained on.

    Slices that look like an excluded one are left out unless ``data.near_excluded`` is true, and
    those of kinds that ``data.modalities`` does not name.

    Raises:
        UserError: If there is no store, it has no such split, or it cannot be trained on.
    """
    if not config.data.store:
        raise UserError("pretraining needs a slice store: give --store DIR (`meddinov3 curate`).")
    store = SliceStore(config.data.store)
    rows = _rows(store, config)
    if not config.data.near_excluded:
        kept = rows[~is_near_excluded(store)[rows]]
        if len(rows) and not len(kept):
            raise UserError(
                f"the store {store.path} must hold slices that do not look like an excluded one, "
                f"but all {len(rows)} do: set data.near_excluded=true to train on them."
            )
        rows = kept
    rows = rows_of_kinds(store, rows, config)
    check_store(store, rows, config)
    return store, rows


def _rows(store: SliceStore, config: StageConfig) -> np.ndarray:
    if config.data.split is None:
        return np.arange(len(store))
    return _rows_of_split(store, config.data.split)


def is_near_excluded(store: SliceStore) -> np.ndarray:
    """Return which rows are flagged as looking like a slice that must not enter, (N,) bool."""
    flags = store.rows["flags"].combine_chunks()
    places = pc.list_parent_indices(flags).to_numpy()
    flagged = np.zeros(len(store), bool)
    flagged[places[pc.equal(pc.list_flatten(flags), NEAR_EXCLUDED).to_numpy(False)]] = True
    return flagged


def said_of_slices(config: StageConfig, store: SliceStore, rows: np.ndarray) -> list[str]:
    """Return lines on the slices of a stage: which are left out, and what the others hold.

    Args:
        config: Of the stage.
        store: What ``open_store`` gave for it, and so are ``rows``.
        rows: Of the slices that are trained on.
    """
    everything = _rows(store, config)
    flagged = is_near_excluded(store)[everything]
    lines = []
    if number := int(flagged.sum()):
        look = (
            f"stage {config.stage}: {number} of {len(flagged)} slices look like an excluded one and"
        )
        lines.append(
            f"{look} are trained on (data.near_excluded=true)"
            if config.data.near_excluded
            else f"{look} are left out (data.near_excluded=true takes them)"
        )
    kept = everything if config.data.near_excluded else everything[~flagged]
    if len(kept) > len(rows):
        lines.append(
            f"stage {config.stage}: {len(kept) - len(rows)} of {len(kept)} slices are of other "
            "kinds than data.modalities names and are left out"
        )
    return [*lines, *said_of_values(store, rows, with_kinds(config, store, rows))]


def _rows_of_split(store: SliceStore, name: str) -> np.ndarray:
    path = store.path / layout.SPLITS
    if not path.is_file():
        raise UserError(
            f"data.split={name} needs a split of the store, but {store.path} has none: make one "
            f"with `meddinov3 store split {store.path} {name}=0.9 rest=0.1`."
        )
    try:
        split = layout.unsealed(path.read_bytes(), "splits_sha256")
    except layout.Damaged as error:
        raise UserError(f"{path} {error}: split the store again.") from error
    if split["records_sha256"] != store.records_sha256:
        raise UserError(
            f"{path} must be of the store as it is now, but it is older: split the store again."
        )
    if name not in split["rows"]:
        raise UserError(f"data.split must be one of {', '.join(split['rows'])}, got {name}.")
    return np.array(split["rows"][name], dtype=np.int64)


def ends_of(store: SliceStore, row: int, config: StageConfig) -> Ends:
    """Return which numbers of a slice are 0 and 1, None where it is in HU or is taken for it."""
    return None if config.intensity.normalised is None else store.ends(row)


def slices_to_follow(store: SliceStore, rows: np.ndarray, config: StageConfig) -> FixedSlices:
    """Return a few slices of different volumes, the same for every run.

    Raises:
        UserError: If one cannot be read.
    """
    places = spread_rows(_volumes(store, rows), store.rows["body_fraction"].to_numpy()[rows])
    chosen = [int(rows[place]) for place in places]
    images = [store.image(row) for row in chosen]
    return fixed_slices(images, [ends_of(store, row, config) for row in chosen], config.intensity)


def _volumes(store: SliceStore, rows: np.ndarray) -> np.ndarray:
    """Return the number of each row's volume."""
    names = pc.dictionary_encode(store.rows["volume_id"].cast("string")).combine_chunks()
    return np.asarray(names.indices)[rows]


class Group(NamedTuple):
    """Some images of a step, the unit in which slices, views and masks are drawn.

    Attributes:
        rows: Of the store.
        resolution: Number of the config's resolution, the same for a whole step.
        seed: For the views and masks.
    """

    rows: tuple[int, ...]
    resolution: int
    seed: tuple[int, ...]


class Sampler:
    """Deals the rows of a store to the groups of steps, epoch after epoch.

    In an epoch every row comes once, but for a remainder smaller than a group. The slices of a
    volume are spread evenly over it: neighbours in one group would be near duplicates, which KoLeo
    pushes apart without end.

    Args:
        rows: (n,) numbers of the rows.
        volumes: (n,) number of the volume of each.
        config: Of the stage.
    """

    def __init__(self, rows: np.ndarray, volumes: np.ndarray, config: StageConfig) -> None:
        self.rows, self.volumes = np.asarray(rows), np.asarray(volumes)
        self.size = config.losses.koleo_group
        self.groups_per_step = config.optim.batch_size // self.size
        self.groups_per_epoch = len(self.rows) // self.size
        self._key = (config.optim.seed, config.stage)
        shares = np.array([each.probability for each in config.crops.resolutions])
        self._shares = shares / shares.sum()
        self._epoch = lru_cache(maxsize=2)(self._order)

    def group(self, step: int, index: int) -> Group:
        """Return a group of a step.

        Args:
            step: From 0.
            index: From 0 to ``groups_per_step - 1``.
        """
        epoch, place = divmod(step * self.groups_per_step + index, self.groups_per_epoch)
        rows = self._epoch(epoch)[place * self.size : (place + 1) * self.size]
        return Group(
            tuple(map(int, rows)), self.resolution(step), (*self._key, step, index, _VIEWS)
        )

    def resolution(self, step: int) -> int:
        """Return which of the config's resolutions a step has."""
        generator = np.random.default_rng((*self._key, step, _RESOLUTION))
        return int(generator.choice(len(self._shares), p=self._shares))

    def _order(self, epoch: int) -> np.ndarray:
        """Return the rows of an epoch: the k-th slice of a volume's n falls in its k-th part."""
        generator = np.random.default_rng((*self._key, epoch, _EPOCH))
        shuffled = generator.permutation(len(self.rows))
        volumes = self.volumes[shuffled]
        by_volume = np.argsort(volumes, kind="stable")
        _, first, counts = np.unique(volumes[by_volume], return_index=True, return_counts=True)
        place = np.empty(len(shuffled))
        place[by_volume] = np.arange(len(shuffled)) - np.repeat(first, counts)
        share = np.empty(len(shuffled))
        share[by_volume] = np.repeat(counts, counts)
        position = (place + generator.random(len(shuffled))) / share
        return self.rows[shuffled[np.argsort(position, kind="stable")]]


class _Failure(str):
    """A user's mistake in a worker; raised there, it would arrive wrapped in a traceback."""


class _Groups(Dataset):
    """Reads the slices of a group and, if asked, makes its views."""

    def __init__(self, store: SliceStore, config: StageConfig, makes_views: bool) -> None:
        self.store, self.config, self.makes_views = store, config, makes_views

    def __getitem__(self, group: Group) -> tuple[Group, Slices | ViewBatch] | _Failure:
        try:
            images = [self.store.image(row) for row in group.rows]
        except UserError as error:
            return _Failure(error)
        slices = Slices.of(images, [ends_of(self.store, row, self.config) for row in group.rows])
        return group, _views(slices, group, self.config) if self.makes_views else slices


def _views(slices: Slices, group: Group, config: StageConfig) -> ViewBatch:
    resolution = config.crops.resolutions[group.resolution]
    return make_views(slices, resolution, config, tuple(group.seed))  # pinning makes it a list


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

    def iterate(self, start_step: int = 0) -> Generator[list[ViewBatch], None, None]:
        """Yield the micro-batches of each step up to the last, on the device.

        Closing the iterator ends the workers.

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
            worker_init_fn=_start_worker,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # else it draws from the global one
        )

    def _ready(self, item: Any) -> ViewBatch:
        if isinstance(item, _Failure):
            raise UserError(str(item))
        group, content = item
        if isinstance(content, ViewBatch):
            return content.to(self.device)
        return _views(content.to(self.device), group, self.config).to(self.device)


def _start_worker(_: int) -> None:
    """Leave signals to the main process, which finishes its step with living workers."""
    leave_stopping_to_the_parent()


def _as_it_is(item: Any) -> Any:
    """Keep the tuples of a group, which a DataLoader would make lists."""
    return item


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
        before = set(multiprocessing.active_children())
        self._iterator: Iterator[Any] | None = iter(loader)
        self._workers = set(multiprocessing.active_children()) - before

    def next(self) -> Any:
        assert self._iterator is not None
        return next(self._iterator)

    def close(self) -> None:
        """Let go of the iterator, at which a DataLoader ends its workers."""
        iterator, self._iterator = weakref.ref(self._iterator), None
        if iterator() is not None:
            return  # an error on its way up still holds it, and lets go of it at its end
        for worker in self._workers:
            if worker.is_alive():  # stuck, and deaf to the SIGTERM it was sent
                worker.kill()
