"""The command ``meddinov3 VERB``: a table of verbs, each imported only when it is asked for."""

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

from nnunetv2_meddinov3 import __version__, discovery

# On import and not in ``main``: the worker processes that nnU-Net spawns import the main script
# again, hence this module, and must find our trainers even where no start-up file is read.
discovery.register()


class Verb(NamedTuple):
    """One verb of the command line.

    Args:
        help: What ``meddinov3 --help`` says of it, in one line.
        target: ``module:function``, called with the list of arguments after the verb.
        stands_for: The command of nnU-Net that ``target`` is; it reads ``sys.argv`` instead.
    """

    help: str
    target: str
    stands_for: str | None = None


VERBS = {
    "plan": Verb(
        "add configurations such as 2d_896 to the plans of a dataset",
        "nnunetv2_meddinov3.planning_cli:main",
    ),
    "train": Verb(
        "nnUNetv2_train with our trainers registered, however this package was installed",
        "nnunetv2.run.run_training:run_training_entry",
        "nnUNetv2_train",
    ),
    "predict": Verb(
        "nnUNetv2_predict, faster for 2D configurations: the same arguments and files",
        "nnunetv2_meddinov3.prediction.predictor:main",
        "nnUNetv2_predict",
    ),
    "curate": Verb(
        "convert CT and MR volumes into a store of slices for pretraining",
        "nnunetv2_meddinov3.curate.cli:main",
    ),
    "store": Verb(
        "verify, merge, split or export a store of slices",
        "nnunetv2_meddinov3.store.cli:main",
    ),
    "pretrain": Verb(
        "adapt a ViT to the slices of a store, in three resumable stages",
        "nnunetv2_meddinov3.pretrain.pretrain_cli:main",
    ),
    "watch": Verb(
        "show a pretraining or training while it goes: progress, time left, losses, health",
        "nnunetv2_meddinov3.watch.cli:main",
    ),
    "probe": Verb(
        "measure frozen features on labelled slices: k-NN, linear, linear segmentation",
        "nnunetv2_meddinov3.pretrain.probe.probe_cli:main",
    ),
    "features": Verb(
        "show what a backbone makes of a scan: principal components as colours",
        "nnunetv2_meddinov3.features.cli:main",
    ),
    "segment": Verb(
        "segment scans (NIfTI, DICOM, ...) with a model's folder or zip, no variables needed",
        "nnunetv2_meddinov3.segment.cli:main",
    ),
    "export-onnx": Verb(
        "write a trained network as one ONNX file, compared with PyTorch's numbers",
        "nnunetv2_meddinov3.segment.onnx_export:main",
    ),
    "report": Verb(
        "write a page on a trained model: curves, Dice, worst and best cases, commands",
        "nnunetv2_meddinov3.report.cli:main",
    ),
    "dataset": Verb(
        "make nnU-Net datasets of AMOS22, BTCV, KiTS23 and LiTS from their downloads",
        "nnunetv2_meddinov3.datasets.cli:main",
    ),
    "evaluate": Verb(
        "measure predictions: Dice, surface Dice, HD95, with intervals and pictures",
        "nnunetv2_meddinov3.evaluation.cli:main",
    ),
    "benchmark": Verb(
        "compare methods by a recipe: plan, run and report the paper's tables and one's own",
        "nnunetv2_meddinov3.benchmark.cli:main",
    ),
    "weights": Verb(
        "inspect, convert or fetch the weights of a backbone",
        "nnunetv2_meddinov3.models.weights_cli:main",
    ),
    "demo": Verb(
        "plan, train and predict on synthetic CT or on your own dataset, and report",
        "nnunetv2_meddinov3.demo.demo:main",
    ),
    "bench": Verb(
        "measure how fast this machine is, and which sizes and batches fit",
        "nnunetv2_meddinov3.bench:main",
    ),
    "doctor": Verb(
        "say what is wrong with this installation and how to fix it",
        "nnunetv2_meddinov3.doctor:main",
    ),
    "ext-path": Verb(
        'print our folder, for export nnUNet_extTrainer="$(meddinov3 ext-path)"',
        "nnunetv2_meddinov3.cli:print_ext_path",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit code.

    Args:
        argv: What was typed after ``meddinov3``; by default that of this process.

    Raises:
        UserError: A mistake of the user's (exit code 1, one sentence on stderr).
    """
    arguments = sys.argv[1:] if argv is None else argv
    try:
        if arguments and arguments[0] in VERBS:
            with warnings.catch_warnings():
                # torch says this while others import it, before whatever a command has to say
                warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", FutureWarning)
                code = _run(VERBS[arguments[0]], arguments[1:])
        else:
            _explain(arguments)
            code = 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stderr.write("meddinov3: interrupted\n")
        return 130
    except BrokenPipeError:
        if not _nobody_reads_stdout():
            raise
        return 1
    return code


def print_ext_path(arguments: list[str]) -> int:
    """Print the folder with the one file that shows our trainers to ``nnUNet_extTrainer``."""
    argparse.ArgumentParser(
        prog="meddinov3 ext-path", description=VERBS["ext-path"].help
    ).parse_args(arguments)
    print(ext_path())
    return 0


def ext_path() -> Path:
    """Return what ``nnUNet_extTrainer`` must name where no start-up file is read."""
    return Path(__file__).resolve().parent / "ext"


def _run(verb: Verb, arguments: list[str]) -> int:
    import importlib

    from nnunetv2_meddinov3.errors import UserError

    if verb.stands_for is not None:
        from nnunetv2_meddinov3 import readiness

        readiness.check_command(verb.stands_for, arguments)
        discovery.check_command(verb.stands_for, arguments)
    module_name, function_name = verb.target.split(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except UserError:
        raise
    except Exception as error:
        raise UserError(discovery.explain_import_error(error)) from error
    if verb.stands_for is None:
        return function(arguments) or 0
    sys.argv = [verb.stands_for, *arguments]
    return function() or 0


def _explain(arguments: list[str]) -> None:
    """Answer ``--help``, ``--version``, no verb at all, or a verb that does not exist."""
    width = max(map(len, VERBS)) + 2
    table = "\n".join(f"  {name:{width}}{verb.help}" for name, verb in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="meddinov3",
        usage="meddinov3 [-h] [--version] VERB ...",
        description="MedDINOv3 for stock nnU-Net. `meddinov3 VERB --help` explains a verb.",
        epilog=f"verbs:\n{table}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"meddinov3 {__version__}")
    _, rest = parser.parse_known_args(arguments)
    if not arguments:
        parser.print_help()
        return
    import difflib

    close = difflib.get_close_matches(rest[0], VERBS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(VERBS)}"
    parser.error(f"unknown verb {rest[0]!r}; {hint}")


def _nobody_reads_stdout() -> bool:
    """Return whether stdout is a pipe closed at its other end; if so, silence the flush at exit."""
    try:
        print(flush=True)  # a flush alone would pass where the failed write emptied the buffer
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
