"""The names in the folder of a run and of its stages."""

from __future__ import annotations

from pathlib import Path

# in the folder of a stage
EXPORT = "teacher.safetensors"
EXPORTS = "exports"
CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
PROVENANCE = "run.json"
BAD_STEPS = "bad_steps"
METRICS = "metrics.jsonl"
HEALTH = "health.jsonl"
PROBE = "probe.jsonl"
REPORT = "report.html"
# in the folder of a run: its stages, also those that have not begun
STAGES = "stages.json"
# that it was stopped after a checkpoint and should be started again
INTERRUPTED = "interrupted"


def stage_folder(out: Path, stage: int) -> Path:
    """Return where a stage of a run writes."""
    return out / f"stage{stage}"


def export_path(folder: Path, step: int) -> Path:
    """Return where the teacher of a step is exported before the end of its stage."""
    return folder / EXPORTS / f"teacher_step_{step:06d}.safetensors"
