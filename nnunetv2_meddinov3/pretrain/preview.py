"""``meddinov3 pretrain --dry-run``: sizes, memory and time of each stage, and one step of it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch
from torch import nn

from nnunetv2_meddinov3.pretrain import parallel
from nnunetv2_meddinov3.pretrain.batch import ViewBatch
from nnunetv2_meddinov3.pretrain.config import check_world
from nnunetv2_meddinov3.pretrain.dry_run import describe
from nnunetv2_meddinov3.pretrain.initialise import load_start
from nnunetv2_meddinov3.pretrain.loader import SliceLoader, open_store
from nnunetv2_meddinov3.pretrain.optim import build_optimizer
from nnunetv2_meddinov3.pretrain.runtime import Runtime, started
from nnunetv2_meddinov3.pretrain.schema import StageConfig
from nnunetv2_meddinov3.pretrain.stages import Plan
from nnunetv2_meddinov3.pretrain.train import Step, rates_at
