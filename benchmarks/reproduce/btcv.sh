#!/usr/bin/env bash
# BTCV: 50 CT, 13 organs.
set -euo pipefail

BENCHMARK=BTCV
DATASET="${DATASET:-Dataset017_BTCV}"
PAPER_TABLE="\
method       |   DSC |   NSD
nnU-Net (2D) | 73.30 | 64.66
SegFormer    | 37.04 | 22.39
Dino U-Net B | 66.88 | 56.23
MedDINOv3    | 78.79 | 70.38"

source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"
