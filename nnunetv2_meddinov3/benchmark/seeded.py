"""Run a command of nnU-Net's with seeded random numbers: ``python -m ... SEED COMMAND ARGUMENTS``.

nnU-Net has no seed. Weights, sampling and augmentation repeat where ``nnUNet_n_proc_DA=0`` keeps
augmentation in this process; on a GPU nnU-Net's own settings leave kernels free to differ.
"""

from __future__ import annotations

import random
import sys
from importlib.metadata import entry_points


def main() -> int | None:
    """Seed and run what stands in ``sys.argv``."""
    import numpy as np
    import torch

    import nnunetv2_meddinov3.cli  # noqa: F401  nnU-Net's workers import this module again

    seed, command = int(sys.argv[1]), sys.argv[2]
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  the generator that nnU-Net draws from
    torch.manual_seed(seed)
    (entry,) = entry_points(group="console_scripts", name=command)
    sys.argv = [command, *sys.argv[3:]]
    return entry.load()()


if __name__ == "__main__":
    sys.exit(main())
