"""What docs/reproduce.md says of our own runs is what the tables in benchmarks/results say."""

import re
from pathlib import Path

import pytest

from nnunetv2_meddinov3.benchmark.recipe import load_recipe
from nnunetv2_meddinov3.benchmark.results import read_results, scores
from nnunetv2_meddinov3.cli import main
from nnunetv2_meddinov3.evaluation.statistics import interval

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def rows_of(title):
    """The cells of the first table below a heading of docs/reproduce.md."""
    text = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    section = text.split(f"### {title}\n")[1].split("\n#")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_of_the_ablation_is_that_of_its_cases():
    recipe = load_recipe("small_ablation")
    results = read_results(RESULTS / "small_ablation")
    (dataset,), (budget,) = recipe.datasets, recipe.budgets
    found = scores(recipe, results, dataset.name, budget.name, "all", "dice")
    rows = rows_of("What a small ViT needs")
    assert len(rows) == len(recipe.methods)
    for (_, dice, seeds), method in zip(rows, recipe.methods, strict=True):
        mean, low, high = (float(text) for text in re.findall(r"[\d.]+", dice))
        known = interval(found.tables[method.name])
        wanted = (known.mean, known.low, known.high)
        assert (mean, low, high) == pytest.approx(wanted, abs=6e-4), method.name
        said = [float(text) for text in seeds.split(",")]
        assert said == pytest.approx(found.seeds[method.name], abs=6e-4), method.name


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.name for path in sorted(RESULTS.iterdir())])
def test_the_page_can_be_made_again_from_the_tables(name, tmp_path):
    given = ["--results", str(RESULTS / name), "-o", str(tmp_path)]
    assert main(["benchmark", "collect", name, *given]) == 0
    assert (tmp_path / "report.html").stat().st_size > 50_000
