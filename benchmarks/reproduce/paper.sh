# Sourced by the scripts beside it: plans, trains and predicts one benchmark as the paper does.
#
# A script sets, before it sources this file:
#   DATASET      the raw dataset's folder in nnUNet_raw, DatasetXXX_Name
#   PAPER_TABLE  the paper's rows for it: method | DSC | NSD
# Whoever runs a script may set:
#   FOLD=0       the paper has one fold of nnU-Net's five
#   WEIGHTS      other weights than the released ones, as MEDDINOV3_WEIGHTS takes them
#   DEVICE=cuda  or mps, cpu
#   IMAGES, PREDICTIONS   folders of images to predict, and for their predictions
#   DRY_RUN=1    print the commands and run none

FOLD="${FOLD:-0}"
DEVICE="${DEVICE:-cuda}"
CONFIGURATION=2d_896
PLANNER=MedDINOv3Planner
PLANS=nnUNetMedDINOv3Plans
TRAINER=MedDINOv3Trainer

if [[ ! "$DATASET" =~ ^Dataset[0-9]{3}_.+$ ]]; then
  echo "DATASET must be a folder name like Dataset219_AMOS, got '$DATASET'." >&2
  exit 1
fi
ID=$((10#${DATASET:7:3}))

if [[ -z "${DRY_RUN:-}" ]]; then
  for variable in nnUNet_raw nnUNet_preprocessed nnUNet_results; do
    if [[ -z "${!variable:-}" ]]; then
      echo "$variable must name a folder, as for every command of nnU-Net." >&2
      exit 1
    fi
  done
  if [[ ! -f "$nnUNet_raw/$DATASET/dataset.json" ]]; then
    echo "$nnUNet_raw/$DATASET must be a raw dataset of nnU-Net; benchmarks/reproduce/README.md says how to make it." >&2
    exit 1
  fi
fi
IMAGES="${IMAGES:-${nnUNet_raw:-NNUNET_RAW}/$DATASET/imagesTs}"
PREDICTIONS="${PREDICTIONS:-${nnUNet_results:-NNUNET_RESULTS}/$DATASET/predictions_$CONFIGURATION}"

if [[ -n "${WEIGHTS:-}" ]]; then
  echo "$ export MEDDINOV3_WEIGHTS=$(printf '%q' "$WEIGHTS")"
  export MEDDINOV3_WEIGHTS="$WEIGHTS"
fi

run() {
  echo "\$$(printf ' %q' "$@")"
  if [[ -z "${DRY_RUN:-}" ]]; then "$@"; fi
}

run nnUNetv2_plan_and_preprocess -d "$ID" -pl "$PLANNER" -c "$CONFIGURATION" --verify_dataset_integrity
run nnUNetv2_train "$ID" "$CONFIGURATION" "$FOLD" -tr "$TRAINER" -p "$PLANS" -device "$DEVICE"
if [[ -n "${DRY_RUN:-}" || -d "$IMAGES" ]]; then
  run nnUNetv2_predict -i "$IMAGES" -o "$PREDICTIONS" -d "$ID" -c "$CONFIGURATION" -f "$FOLD" \
    -tr "$TRAINER" -p "$PLANS" -device "$DEVICE"
else
  echo "Nothing to predict: there is no folder $IMAGES."
fi

cat <<TEXT

To compare with: arXiv 2509.02379, table 2, $BENCHMARK, validation cases of one fold, in per cent
$PAPER_TABLE

Before comparing:
- The images of this benchmark, test images included, are in the data that the released weights were
  pretrained on (without labels). The authors say so in issue 4 of ricklisz/MedDINOv3.
- One fold, one run, no confidence interval. The authors' code measures NSD at 1 mm and validates
  with the checkpoint that was best on the fold it is measured on; the commands above validate with
  the last one.
TEXT
SUMMARY="${nnUNet_results:-NNUNET_RESULTS}/$DATASET/${TRAINER}__${PLANS}__$CONFIGURATION/fold_$FOLD/validation/summary.json"
echo "- This run's Dice: $SUMMARY (foreground_mean, and mean for each label; 0 to 1)."
