"""``report.html`` of a stage: what was run, how it went, and what its features look like."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure

from nnunetv2_meddinov3.files import write_text
from nnunetv2_meddinov3.pretrain.checkpoints import CONFIG, HEALTH, PROBE, PROVENANCE, REPORT
from nnunetv2_meddinov3.pretrain.monitor.features import load_maps
from nnunetv2_meddinov3.pretrain.monitor.logger import METRICS, read_rows
from nnunetv2_meddinov3.pretrain.monitor.run_figures import curves, maps

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; color: #222;
  padding: 0 1rem }
table { border-collapse: collapse }
th, td { padding: .15rem .8rem; text-align: left; border-bottom: 1px solid #ddd }
img { max-width: 100% }
.wrong { color: #a02030 }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 12px }
</style>
</head>
<body>
<h1>$title</h1>
<p>$summary</p>
<h2>Health</h2>
$health
<h2>Losses and gradients</h2>
$losses
<h2>Figures of health</h2>
<p>Effective rank: how many directions features fill. Entropy of the targets: 1 is uniform, which
says nothing. Prototypes used: those that are some crop's first choice.</p>
$figures
$probes
$maps
<h2>Run</h2>
$facts
<h2>Config</h2>
<details><summary>every value</summary><pre>$config</pre></details>
</body>
</html>
""")

_LOSSES = {
    "total": ["loss_total"],
    "DINO": ["loss_dino_local", "loss_dino_global"],
    "iBOT": ["loss_ibot"],
    "KoLeo (mean over crops)": ["loss_koleo"],
    "Gram": ["loss_gram"],
    "learning rate": ["lr"],
    "gradient norm before clipping": ["grad_backbone", "grad_dino_head", "grad_ibot_head"],
    "images per second": ["images_per_second"],
    "waiting for data, %": ["data_wait_percent"],
}
_FIGURES = {
    "effective rank of cls tokens": ["cls_rank_student", "cls_rank_teacher"],
    "effective rank of patch tokens": ["patch_rank_student", "patch_rank_teacher"],
    "mean cosine between cls tokens": ["cls_similarity_student", "cls_similarity_teacher"],
    "entropy of targets / ln K": ["cls_target_entropy_share", "patch_target_entropy_share"],
    "prototypes used, share": ["prototypes_used"],
    "drift of patch similarities": ["gram_drift"],
    "relative change of weights": ["update"],
}
_PROBES = {
    "slices, k-NN": ["knn"],
    "slices, linear": ["linear"],
    "segmentation, linear (Dice)": ["dense"],
}


def write_report(folder: Path) -> Path:
    """Write the page, which needs no other file, from the files of a stage.

    Args:
        folder: Of the stage.

    Returns:
        Its path.

    Raises:
        UserError: If it cannot be written.
    """
    metrics, health = read_rows(folder / METRICS), read_rows(folder / HEALTH)
    probes, moments = read_rows(folder / PROBE), load_maps(folder)
    facts = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    title = f"{folder.resolve().parent.name}, {folder.name}"
    page = _PAGE.substitute(
        title=html.escape(title),
        summary=html.escape(_summary(metrics)),
        health=_verdicts(health),
        losses=_image(curves(metrics, _LOSSES)) if metrics else "<p>None yet.</p>",
        figures=_image(curves(health, _FIGURES)) if health else "<p>None yet.</p>",
        probes=_probes(probes),
        maps=_maps(moments),
        facts=_table(facts),
        config=html.escape((folder / CONFIG).read_text(encoding="utf-8")),
    )
    write_text(folder / REPORT, page)
    return folder / REPORT


def _summary(metrics: list[dict[str, Any]]) -> str:
    if not metrics:
        return "No step is done."
    last = metrics[-1]
    speed = sorted(row["images_per_second"] for row in metrics)[len(metrics) // 2]
    skipped = sum(row["skipped"] for row in metrics)
    return (
        f"{last['step']} steps, total loss {metrics[0]['loss_total']:.3f} at step "
        f"{metrics[0]['step']} and {last['loss_total']:.3f} at the last; {speed:.1f} images/s "
        f"(median), {max(r['memory_gb'] for r in metrics):.2f} GB of memory, {skipped} of the "
        "logged steps skipped."
    )


def _verdicts(health: list[dict[str, Any]]) -> str:
    """Each thing that went wrong, with the steps at which it was said."""
    said: dict[str, list[int]] = {}
    for row in health:
        for sentence in row.get("verdicts", ()):
            said.setdefault(sentence.partition("(")[0], []).append(row["step"])
    if not said:
        return "<p>Nothing went wrong at any check.</p>"
    latest = {s.partition("(")[0]: s for row in health for s in row.get("verdicts", ())}
    items = [
        f"<li class=wrong>{html.escape(latest[key])} (checks from step {steps[0]} to {steps[-1]}, "
        f"{len(steps)} of {len(health)})</li>"
        for key, steps in said.items()
    ]
    return f"<ul>{''.join(items)}</ul>"


def _probes(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    picture = _image(curves(rows, _PROBES))
    start = next((r for r in rows if r.get("weights") == "start"), None)
    words = ""
    if start:
        values = ", ".join(
            f"{k} {start[k]:.3f}" for k in ("knn", "linear", "dense") if start.get(k)
        )
        words = f"<p>The weights at the start: {values} (step 0).</p>"
    said = [r["verdict"] for r in rows if r.get("verdict")]
    worse = f"<p class=wrong>{html.escape(said[-1])}</p>" if said else ""
    return f"<h2>Probes</h2>{words}{worse}{picture}"


def _maps(moments: list) -> str:
    if not moments:
        return ""
    colours, similar = maps(moments)
    return (
        "<h2>Features of the teacher</h2><p>The same slices over time. Three principal "
        "components of the patch tokens as red, green and blue; colours of neighbouring columns "
        f"are turned to fit, their absolute values mean nothing.</p>{_image(colours)}<p>Cosine of "
        f"every patch with the one at the cross.</p>{_image(similar)}"
    )


def _table(facts: dict[str, Any]) -> str:
    rows = [
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(_plain(value))}</td></tr>"
        for key, value in facts.items()
    ]
    return f"<table>{''.join(rows)}</table>"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _image(figure: Figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'
