"""The page that a training leaves of its model."""

import re

import pytest

from nnunetv2_meddinov3.report import after_validation, model_page
from nnunetv2_meddinov3.report.model_folder import read_model
from nnunetv2_meddinov3.watch.cli import read_run

# conftest.py replaces it, which would draw in every test
_write = after_validation.write_after_validation


@pytest.fixture
def with_page(monkeypatch):
    monkeypatch.setattr(after_validation, "write_after_validation", _write)


def log_of(fold):
    return "".join(path.read_text() for path in sorted(fold.glob("training_log_*.txt")))


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["MedDINOv3Trainer", "UNetTrainer"])
def test_a_training_ends_with_a_page(
    trainer, workplace, short_run, with_page, monkeypatch, tmp_path, released_file
):
    released_file(tmp_path / "tiny.pth")
    monkeypatch.setenv("MEDDINOV3_WEIGHTS", str(tmp_path / "tiny.pth"))
    monkeypatch.delenv("MEDDINOV3_BACKBONE")
    fold = workplace.train(1, trainer)
    page = fold.parent / "report.html"
    text = page.read_text()
    assert f"Report: {page}" in log_of(fold)
    assert "fold_0: 2" in text
    assert len(re.findall("<img", text)) == 3  # dots, cases, curves: one validation case
    assert "validation case." in text
    if trainer == "MedDINOv3Trainer":
        assert f"ViT: {tmp_path / 'tiny.pth'} (" in text
        assert "licence of the weights" in text
        assert "2 of 2 epochs" in text
    assert f"-tr {trainer} -p nnUNetPlans" in text
    # what is watched is what the checkpoint holds, to the digits of the log
    part, [of_checkpoint] = read_run(fold).parts[0], read_model(fold).folds
    curves = {curve.name: list(curve.values) for curve in part.curves}
    for name, key in (("training loss", "train_loss"), ("validation loss", "val_loss")):
        logged = [row[key] for row in of_checkpoint.epochs]
        assert curves[name] == pytest.approx(logged, abs=1e-4)
    assert (part.state, part.done, part.total) == ("finished", 2, 2)


@pytest.mark.slow
def test_a_page_that_fails_does_not_fail_the_training(
    workplace, short_run, with_page, monkeypatch, tmp_path
):
    def fail(*args):
        raise MemoryError("no room")

    monkeypatch.setattr(model_page, "write_model_page", fail)
    fold = workplace.train(1, "MedDINOv3Trainer_scratch")
    assert (fold / "validation" / "summary.json").is_file()
    assert "The report was not written (no room); `meddinov3 report " in log_of(fold)
