"""Run a command of nnU-Net's as a job: seeded, in its share of the cores, a trainer changed.

``python -m ... SEED CHANGES COMMAND ARGUMENTS``, CHANGES JSON such as ``{"vit_lr": 1e-3}``. After
CHANGES, ``--no-validation`` ends a training without predicting its validation cases.

nnU-Net has no seed. Weights, sampling and augmentation repeat where ``nnUNet_n_proc_DA=0`` keeps
augmentation in this process; on a GPU nnU-Net's own settings leave kernels free to differ. On a CPU
it takes all cores, whatever ``OMP_NUM_THREADS`` says: two jobs at a time are then ten times slower.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from nnunetv2_meddinov3.errors import UserError

NO_VALIDATION = "--no-validation"


def main() -> int | None:
    """Run what stands in ``sys.argv``."""
    import numpy as np
    import torch

    import nnunetv2_meddinov3.cli  # noqa: F401  nnU-Net's workers import this module again

    seed, changes, rest = int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
    validates = rest[0] != NO_VALIDATION
    command, *arguments = rest if validates else rest[1:]
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  the generator that nnU-Net draws from
    torch.manual_seed(seed)
    limit_threads(os.environ.get("OMP_NUM_THREADS", ""))
    sys.argv = [command, *arguments]
    if not validates:
        leave_validation_out()
    if changes:
        change(sys.argv[sys.argv.index("-tr") + 1], changes)
    (entry,) = entry_points(group="console_scripts", name=command)
    return entry.load()()


def leave_validation_out() -> None:
    """Let trainings in this process end with their last epoch: other cases will be predicted."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    nnUNetTrainer.perform_actual_validation = lambda self, save_probabilities=False: None


def limit_threads(share: str) -> None:
    """Let no later call in this process give torch more threads than its share.

    Args:
        share: Their number; ``""`` for no limit.
    """
    import torch

    if share.isdecimal() and int(share):
        limit, set_num_threads = int(share), torch.set_num_threads
        torch.set_num_threads = lambda nthreads: set_num_threads(min(nthreads, limit))
        torch.set_num_threads(limit)


def change(trainer: str, changes: Mapping[str, Any]) -> None:
    """Set attributes of one of our trainer classes in this process, such as its rates.

    Args:
        trainer: Name of the class.
        changes: Attribute -> value of the kind that it has.

    Raises:
        UserError: If the class is not ours, or has no such attribute of that kind.
    """
    kind = check_changes(trainer, changes)
    for name, value in changes.items():
        setattr(kind, name, value)


def check_changes(trainer: str, changes: Mapping[str, Any]) -> type:
    """Return the class of a trainer whose attributes may be changed so.

    Raises:
        UserError: As ``change``.
    """
    from nnunetv2_meddinov3 import discovery

    if trainer not in discovery.TRAINERS:
        raise UserError(f"changes must be of one of our trainers, but {trainer} is none.")
    kind: type = discovery.resolve(trainer)
    known = {
        name: getattr(kind, name)
        for cls in kind.__mro__
        for name in vars(cls)
        if not name.startswith("_") and isinstance(getattr(kind, name), (bool, int, float))
    }
    for name, value in changes.items():
        if name not in known:
            raise UserError(
                f"changes of {trainer} must be of {', '.join(sorted(known)) or 'nothing'}, but "
                f"{name} came."
            )
        if isinstance(value, bool) is not isinstance(known[name], bool):
            raise UserError(f"{name} of {trainer} is {known[name]!r}, so {value!r} cannot be it.")
    return kind


if __name__ == "__main__":
    sys.exit(main())
