"""The page that our trainers write themselves."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from nnunetv2_meddinov3.errors import first_line


def write_after_validation(trainer: Any) -> None:
    """Write the page of the model that a trainer belongs to, and log where it is.

    A page that cannot be made is a sentence in the log: it must not fail a training.

    Args:
        trainer: An nnUNetTrainer whose validation is done; other ranks than 0 do nothing.
    """
    if trainer.local_rank != 0:
        return
    folder = Path(trainer.output_folder_base)
    try:
        from nnunetv2_meddinov3.report.model_folder import PAGE, read_model
        from nnunetv2_meddinov3.report.model_page import write_model_page

        page = write_model_page(folder / PAGE, read_model(folder))
        trainer.print_to_log_file(f"Report: {page}")
    except Exception as error:
        trainer.print_to_log_file(
            f"The report was not written ({first_line(error)}); "
            f"`meddinov3 report {shlex.quote(str(folder))}` tries again."
        )
