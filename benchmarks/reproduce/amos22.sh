#!/usr/bin/env bash
# AMOS22: 300 CT and 60 MRI, 15 organs.
set -euo pipefail

BENCHMARK=AMOS22
DATASET="${DATASET:-Dataset219_AMOS2022_postChallenge_task2}"
PAPER_TABLE="\
method       |   DSC |   NSD
nnU-Net (2D) | 84.81 | 73.98
SegFormer    | 78.50 | 65.20
Dino U-Net B | 80.90 | 67.00
MedDINOv3    | 87.38 | 77.15"

source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"
