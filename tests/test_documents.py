"""What the documents say: links lead somewhere, commands exist, numbers are those of the code."""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from nnunetv2_meddinov3 import __version__, cli
from nnunetv2_meddinov3.models.architecture import architecture_of
from nnunetv2_meddinov3.pretrain.config import load_config
from nnunetv2_meddinov3.pretrain.memory import memory_gb

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NOTEBOOK = ROOT / "docs/example.ipynb"


def name_of(path):
    return str(path.relative_to(ROOT))


def prose_of(path):
    """A page without its code blocks."""
    return "\n".join(ln for ln in path.read_text("utf-8").splitlines() if not ln.startswith("    "))


def anchors_of(path):
    """The headings of a page as links name them."""
    heads = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        assert file.exists(), target
        assert not anchor or anchor in anchors_of(file), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pictures_have_words_for_those_who_cannot_see_them(page):
    for words, _ in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text("utf-8")):
        assert len(words.split()) > 5


def test_the_index_leads_to_every_document():
    linked = set(re.findall(r"\]\(([^)#\s]+)", (ROOT / "docs/index.md").read_text("utf-8")))
    wanted = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.*")}
    pictures = {name for name in wanted if name.endswith(".png")}
    assert wanted - pictures - {"index.md"} <= linked


def commands_in(text):
    """Commands ``meddinov3 VERB ...`` of a text: whole lines of code, and code within prose."""
    for found in re.findall(
        r"(?:^ {4}|`|^)(?:[A-Z_0-9]+=\S+ )*meddinov3 ([a-z][^`\n]*)", text, re.M
    ):
        with contextlib.suppress(ValueError):  # prose with an apostrophe
            yield shlex.split(found, comments=True)


TEXTS = [*PAGES, NOTEBOOK]


def text_of(path):
    if path.suffix != ".ipynb":
        return path.read_text("utf-8")
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells)


@pytest.mark.slow
@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_commands_and_their_options_exist(page):
    for words in commands_in(text_of(page)):
        assert words[0] in cli.VERBS, words
        if cli.VERBS[words[0]].stands_for is None:
            options = {re.split("[=,;:)]", w)[0] for w in words if re.fullmatch(r"--?[a-z].*", w)}
            assert options <= options_of(*words[:2]) | options_of(words[0]), words


HELPS = {}


def options_of(*verb):
    """The options that a verb, or a part of it such as ``features pca``, explains."""
    if verb not in HELPS:
        out = io.StringIO()
        caught = contextlib.suppress(SystemExit, ValueError)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), caught:
            cli.main([*verb, "--help"])
        HELPS[verb] = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", out.getvalue()))
    return HELPS[verb]


def test_an_option_that_does_not_exist_would_be_seen():
    [words] = commands_in("    meddinov3 segment x.nii.gz --modell M")
    assert words == ["segment", "x.nii.gz", "--modell", "M"]
    assert "--modell" not in options_of("segment")
    assert "--model" in options_of("segment")
    assert list(commands_in("`MEDDINOV3_SIZE=448 meddinov3 plan -d 8`")) == [["plan", "-d", "8"]]


def test_the_readme_opens_as_users_read_and_names_every_command():
    text = (ROOT / "README.md").read_text("utf-8")
    order = ["![", "## Install", "## First results", "| I want to |", "## Fine-tune"]
    assert [text.index(each) for each in order] == sorted(text.index(each) for each in order)
    assert {verb for verb in cli.VERBS if f"meddinov3 {verb}" not in text} == set()


def test_the_citation_is_of_this_version():
    facts = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= facts.keys()
    assert facts["version"] == __version__
    assert facts["license"] == "Apache-2.0"
    for work in [facts, *facts["references"]]:
        assert work["type"] in {"software", "article"}
        assert all({"name"} <= a.keys() or {"family-names"} <= a.keys() for a in work["authors"])
    assert "arXiv:2509.02379" in str(facts["references"][0])


ROW = re.compile(r"^\| (vit[sbl]16), stage (\d) \| ([\d.]+) \| ([\d.]+) \|$", re.MULTILINE)
SIZES = {"vits16": "vit_small", "vitb16": "vit_base", "vitl16": "vit_large"}
STAGES = {"1": "stage1", "2": "stage2_gram", "3": "stage3_highres"}


@pytest.mark.parametrize("row", ROW.findall((ROOT / "docs/memory.md").read_text("utf-8")))
def test_the_counted_memory_is_what_the_code_counts(row):
    family, stage, *said = row
    config = load_config(f"{family}_{STAGES[stage]}")
    assert config.optim.batch_size == 512
    for processes, gigabytes in zip((8, 32), said, strict=True):
        share = config.optim.batch_size // processes
        at_once = min(share, config.engine.micro_batch)
        counted = memory_gb(config, architecture_of(SIZES[family]), at_once, True, share)
        assert f"{sum(counted.values()):.1f}" == gigabytes


def test_all_sizes_and_stages_are_in_that_table():
    rows = ROW.findall((ROOT / "docs/memory.md").read_text("utf-8"))
    assert [row[:2] for row in rows] == [(size, stage) for size in SIZES for stage in STAGES]


def test_the_notebook_is_kept_without_what_it_printed():
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
