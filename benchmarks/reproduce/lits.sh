#!/usr/bin/env bash
# LiTS: 131 CT; liver, tumour.
set -euo pipefail

BENCHMARK=LiTS
DATASET="${DATASET:-Dataset003_Liver}"
PAPER_TABLE="\
method       |   DSC |   NSD
nnU-Net (2D) | 75.00 | 53.02
SegFormer    | 65.45 | 35.98
Dino U-Net B | 72.89 | 48.25
MedDINOv3    | 75.28 | 53.01"

source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"
