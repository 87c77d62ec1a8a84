import base64
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from nnunetv2_meddinov3.curves import draw_curves
from nnunetv2_meddinov3.files import write_rows
from nnunetv2_meddinov3.pretrain.monitor.health import measure, verdicts
from nnunetv2_meddinov3.pretrain.monitor.report import draw_maps, write_report
from nnunetv2_meddinov3.pretrain.monitor.tracker import Moment, save_moment
from nnunetv2_meddinov3.pretrain.monitor.words import HEALTH_PANELS, LOSSES, PROBES


class Page(HTMLParser):
    """The texts of a page by the tag around them, its pictures and its tables."""

    def __init__(self, path):
        super().__init__()
        self.texts, self.pictures, self.rows, self.wrong = {}, [], [], []
        self._open = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self._open == []  # every tag is closed

    def handle_starttag(self, tag, attributes):
        facts = dict(attributes)
        if tag == "img":
            head, _, data = facts["src"].partition(",")
            assert head == "data:image/png;base64"
            self.pictures.append((facts["alt"], Image.open(io.BytesIO(base64.b64decode(data)))))
        elif tag != "meta":
            self._open.append((tag, facts.get("class")))
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, text):
        if not self._open or not text.strip():
            return
        tag = self._open[-1][0]
        self.texts.setdefault(tag, []).append(text)
        if tag in ("td", "th"):
            self.rows[-1].append(text)
        if "wrong" in [kind for _, kind in self._open]:
            self.wrong.append(text)


def some_run(folder, health=None, probes=(), moments=(0, 10, 20)):
    folder.mkdir(parents=True)
    metrics = [
        {"step": s, "loss_total": 9 - s / 10, "loss_koleo": 0.1, "lr": 1e-3, "skipped": s == 5}
        | {"images_per_second": 5.0 + s, "memory_gb": 1.5, "data_wait_percent": 3}
        for s in range(1, 30)
    ]
    write_rows(folder / "metrics.jsonl", metrics)
    if health is None:
        figures = {"cls_rank_student": 20.0, "cls_rank_teacher": 21.0, "update": None}
        health = [{"step": s, **figures, "verdicts": []} for s in (1, 10, 20)]
    write_rows(folder / "health.jsonl", health)
    write_rows(folder / "probe.jsonl", probes)
    (folder / "config.yaml").write_text("stage: 1\nnote: <b>&\n")
    facts = {
        "command": ["meddinov3", "<x>"],
        "git": {"commit": "1a2b", "clean": False},
        "world_size": 2,
    }
    facts["versions"] = {"torch": "2.6", "timm": None}
    (folder / "run.json").write_text(json.dumps(facts))
    slices = torch.rand(2, 1, 64, 64) * 400 - 200
    for step in moments:
        save_moment(folder, step, slices, torch.randn(2, 4, 4, 8))
    return folder


def report_of(folder, **content):
    return Page(write_report(some_run(folder, **content)))


def collapsing_run():
    """Checks of a run whose images all get the same features from step 20 on, and what is said."""
    generator, history = torch.Generator().manual_seed(0), []
    for step in (1, 10, 20, 30):
        features = torch.randn(64, 32, generator=generator)
        patches = torch.randn(64, 9, 32, generator=generator)
        if step >= 20:
            features = torch.ones(64, 32) + 0.01 * features[:1] * step
        targets = (4 * torch.randn(64, 64, generator=generator)).softmax(-1)
        observed = {"cls_student": features, "cls_teacher": features}
        observed |= {"patches_student": patches, "patches_teacher": patches}
        observed |= {"cls_targets": targets, "patch_targets": targets}
        row = {"step": step, "loss": 9.0, "update": 1e-3, **measure(observed)}
        row["verdicts"] = verdicts([*history, row])
        history.append(row)
    return history


def test_a_healthy_run_has_its_sections_sentences_and_facts(tmp_path):
    page = report_of(tmp_path / "ct" / "stage1")
    assert page.texts["h1"] == ["ct, stage1"]
    assert page.texts["title"] == ["ct, stage1"]
    assert page.texts["h2"] == [
        "Health",
        "Losses and gradients",
        "Health metrics",
        "Features of the teacher",
        "Run",
        "Config",
    ]
    assert page.texts["p"][:2] == [
        "29 steps, total loss 8.900 at step 1 and 6.100 at the last; 20.0 images/s (median), "
        "1.50 GB of memory, 1 of the logged steps skipped.",
        "Nothing went wrong at any check.",
    ]
    assert page.rows == [
        ["command", "meddinov3 <x>"],
        ["code", "commit 1a2b, not clean"],
        ["processes", "2"],
        ["versions", "torch 2.6, timm unknown"],
    ]
    assert page.texts["summary"] == ["every value"]
    assert page.texts["pre"] == ["stage: 1\nnote: <b>&\n"]
    assert page.wrong == []


def test_every_picture_says_in_words_what_it_shows(tmp_path):
    page = report_of(tmp_path / "ct" / "stage1")
    assert [alt for alt, _ in page.pictures] == [
        "Curves from step 1 to 29: total loss: from 8.9 to 6.1; KoLeo loss, mean over crops: from "
        "0.1 to 0.1; learning rate: from 0.001 to 0.001; images per second: from 6 to 34; waiting "
        "for data, % of the time: from 3 to 3.",
        "Curves from step 1 to 20: effective rank of cls tokens: student from 20 to 20, teacher "
        "from 21 to 21.",
        "Principal components as colours: 2 slices, a row each, at the steps 0, 10, 20.",
        "Cosine with the patch at the cross: 2 slices, a row each, at the steps 0, 10, 20.",
    ]
    for _, picture in page.pictures:
        assert np.asarray(picture.convert("L")).std() > 5  # something is drawn
        assert picture.width > 400


def test_the_page_needs_no_other_file(tmp_path):
    text = write_report(some_run(tmp_path / "stage1")).read_text()
    for word in ("http:", "https:", "<link", "<script", "url(", "src="):
        assert word not in text.replace('src="data:image/png;base64,', "")


def test_a_collapse_is_said_with_the_steps_at_which_it_was_seen(tmp_path):
    page = report_of(tmp_path / "stage1", health=collapsing_run())
    assert "Nothing went wrong at any check." not in page.texts["p"]
    assert len(page.wrong) == 4 == len(page.texts["li"])
    for who in ("student", "teacher"):
        assert any(
            f"collapse: the {who} gives all images nearly the same features (effective rank 1.0"
            in sentence
            and sentence.endswith("(checks from step 20 to 30, 2 of 4)")
            for sentence in page.wrong
        ), page.wrong
        assert any(f"collapse: the {who}'s cls tokens of different" in s for s in page.wrong)


def test_a_sentence_is_shown_as_it_was_said_last(tmp_path):
    said = {10: "rank is low (1.4); lower lr.", 20: "rank is low (1.1); lower lr."}
    health = [{"step": s, "verdicts": [said[s]] if s in said else []} for s in (1, 10, 20, 30)]
    page = report_of(tmp_path / "stage1", health=health)
    assert page.wrong == ["rank is low (1.1); lower lr. (checks from step 10 to 20, 2 of 4)"]


def test_probes_show_the_start_the_curves_and_what_became_worse(tmp_path):
    rows = [
        {"step": 0, "weights": "start", "knn": None, "linear": 0.5, "dense": 0.3, "verdict": None},
        {"step": 20, "weights": "teacher", "knn": None, "linear": 0.25, "dense": 0.375}
        | {"verdict": "the features have become worse."},
    ]
    page = report_of(tmp_path / "stage1", probes=rows)
    assert page.texts["h2"][3] == "Probes"
    assert (
        "The weights at the start (step 0): linear probe on slices, mAP 0.500; linear "
        "segmentation, Dice 0.300."
    ) in page.texts["p"]
    assert page.wrong == ["the features have become worse."]
    assert page.pictures[2][0] == (
        "Curves from step 0 to 20: linear probe on slices, mAP: from 0.5 to 0.25; linear "
        "segmentation, Dice: from 0.3 to 0.375."
    )


def test_probes_show_the_blind_guess_and_that_a_few_patients_have_no_interval(tmp_path):
    blind = {"knn": None, "linear": 0.25, "dense": 0.125}
    row = {"knn": None, "linear": 0.5, "dense": 0.3, "verdict": None, "blind": blind}
    rows = [{"step": 0, "weights": "start", **row, "patients": [4, 3]}]
    rows.append({"step": 20, "weights": "teacher", **row, "patients": [4, 3]})
    page = report_of(tmp_path / "few", probes=rows)
    assert (
        "The weights at the start (step 0): linear probe on slices, mAP 0.500 (blind guess 0.250); "
        "linear segmentation, Dice 0.300 (blind guess 0.125)."
    ) in page.texts["p"]
    assert any(
        text.startswith("Too few patients for an interval (n = 3") for text in page.texts["p"]
    )
    assert "segmentation from 0.3 to 0.3, blind guess from 0.125 to 0.125" in page.pictures[2][0]
    enough = [{**each, "patients": [20, 6]} for each in rows]
    page = report_of(tmp_path / "enough", probes=enough)
    assert not any("Too few patients" in text for text in page.texts["p"])


def test_a_run_that_has_hardly_begun_has_a_report(tmp_path):
    folder = tmp_path / "stage1"
    folder.mkdir()
    (folder / "config.yaml").write_text("stage: 1\n")
    (folder / "run.json").write_text("{}")
    page = Page(write_report(folder))
    assert page.texts["p"][0] == "No step is done yet."
    assert page.texts["p"].count("None yet.") == 2
    assert page.texts["h2"] == [
        *("Health", "Losses and gradients", "Health metrics", "Run", "Config")
    ]
    assert page.pictures == []


@pytest.mark.parametrize("panels", [LOSSES, HEALTH_PANELS, PROBES])
def test_curves_are_labelled_in_words(panels):
    keys = [key for series in panels.values() for key in series]
    rows = [{"step": step, **dict.fromkeys(keys, float(step))} for step in (1, 2)]
    axes = [axis for axis in draw_curves(rows, panels).axes if axis.get_title(loc="left")]
    assert [axis.get_title(loc="left") for axis in axes] == list(panels)
    labels = [line.get_label() for axis in axes for line in axis.lines]
    assert labels == [name for series in panels.values() for name in series.values()]
    assert not any("_" in text for text in [*labels, *panels])


def test_maps_stand_in_rows_of_slices_and_columns_of_steps():
    generator = np.random.default_rng(0)
    slices = np.full((2, 32, 32), -1000, np.int16)
    slices[0, 24:, 24:] = slices[1, :8, :8] = 40  # the body
    moments = [Moment(s, slices, generator.normal(size=(2, 4, 4, 8))) for s in (0, 5)]
    for figure in draw_maps(moments):
        axes = np.array([a for a in figure.axes if a.get_label() != "<colorbar>"]).reshape(2, 3)
        assert [axis.get_title() for axis in axes[0]] == ["slice", "step 0", "step 5"]
        np.testing.assert_array_equal(axes[1, 0].images[0].get_array(), slices[1])
    crosses = [[tuple(line.get_xydata()[0]) for line in axis.lines] for axis in axes[:, 1]]
    assert crosses == [[(3, 3)], [(0, 0)]]
    assert axes[0, 1].images[0].get_array()[3, 3] == pytest.approx(1)  # the cosine with itself
