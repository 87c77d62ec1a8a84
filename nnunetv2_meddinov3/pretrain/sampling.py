"""Which slices a step sees: a function of seed, stage and step, whatever rank or worker asks."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from nnunetv2_meddinov3.pretrain.config import StageConfig

# the last number of a seed says what is drawn, so that nothing is drawn twice
_EPOCH, _RESOLUTION, _VIEWS = range(3)


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
