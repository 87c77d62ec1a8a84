#!/usr/bin/env bash
# KiTS23: 489 CT; kidney, tumour, cyst.
set -euo pipefail

BENCHMARK=KiTS23
DATASET="${DATASET:-Dataset220_KiTS2023}"
PAPER_TABLE="\
method       |   DSC |   NSD
nnU-Net (2D) | 69.15 | 64.85
SegFormer    | 57.73 | 47.65
Dino U-Net B | 59.77 | 51.05
MedDINOv3    | 70.68 | 62.67"

source "$(dirname "${BASH_SOURCE[0]}")/paper.sh"
