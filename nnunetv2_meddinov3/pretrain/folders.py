"""The files of a stage's folder."""

from pathlib import Path

EXPORT = "teacher.safetensors"
EXPORTS = "exports"
CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
RUN_FACTS = "run.json"
BAD_STEPS = "bad_steps"
HEALTH = "health.jsonl"
PROBE = "probe.jsonl"
REPORT = "report.html"
INTERRUPTED = "interrupted"  # of the run: it was saved, and is to be started again


def export_path(folder: Path, step: int) -> Path:
    """Return where the teacher of a step is exported before the end of its stage."""
    return folder / EXPORTS / f"teacher_step_{step:06d}.safetensors"
