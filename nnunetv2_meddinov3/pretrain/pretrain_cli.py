"""``meddinov3 pretrain``: from a slice store to one checkpoint, in up to three stages."""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

from nnunetv2_meddinov3.errors import UserError

_DESCRIPTION = """\
Adapts a DINOv3 ViT to the slices of a store (`meddinov3 curate`) in three stages: DINO, iBOT and
KoLeo; Gram anchoring; high resolution. Each stage goes on from its last checkpoint when the same
command is started again. The result, DIR/stage3/teacher.safetensors, is what MEDDINOV3_WEIGHTS
takes.
"""
_EXAMPLES = """\
examples:
  meddinov3 pretrain tiny --store store --out run              all three stages, on a laptop
  meddinov3 pretrain vitb16 --store store --out run --dry-run  sizes, memory, time; one step
  torchrun --nproc-per-node 8 -m nnunetv2_meddinov3 pretrain vitb16 --store store --out run
  meddinov3 pretrain vitb16 --stage 1 --store store --out run optim.batch_size=64
  meddinov3 pretrain my_stage1.yaml my_stage2.yaml --store store --out run stage2.optim.steps=5000
"""


def main(argv: list[str] | None = None) -> int:
    """Pretrain as the command line says.

    Args:
        argv: What was typed after ``meddinov3 pretrain``; by default that of this process.

    Returns:
        The exit code: 0 at the end of the last stage, 128 + its number if a signal ended the run
        after a checkpoint was saved.

    Raises:
        UserError: A mistake in the command or the config, before anything is written, or something
            that cannot be read or written.
    """
    arguments = _parser().parse_intermixed_args(argv)
    names = [word for word in arguments.words if "=" not in word]
    overrides = [word for word in arguments.words if "=" in word]
    # `--help` waits for none of these imports, a mistake in the command not for torch.
    from nnunetv2_meddinov3.pretrain.stages import (
        check,
        gram_teachers_in_warm_up,
        next_command,
        settled,
        stages_of,
        world_size,
    )

    stages = stages_of(
        names,
        overrides,
        stage=arguments.stage,
        store=arguments.store,
        init=arguments.init,
        steps=arguments.steps,
    )
    if arguments.out is None and not arguments.dry_run:
        raise UserError("pretraining needs a folder to write to: give --out DIR.")
    stages = settled(stages, None if arguments.dry_run else arguments.out)
    check(stages, None if arguments.dry_run else arguments.out)
    if os.environ.get("RANK", "0") == "0":
        for sentence in gram_teachers_in_warm_up(stages, arguments.out):
            print(sentence, file=sys.stderr)
    if arguments.dry_run:
        from nnunetv2_meddinov3.pretrain.dry_run import dry_run

        dry_run(stages, sys.stdout)
        return 0
    from nnunetv2_meddinov3.pretrain.run import run

    following = next_command(names, overrides, stages[-1], arguments.out, arguments.steps)
    code = run(stages, arguments.out, sys.stderr, following)
    if world_size() > 1:
        _leave(code)
    return code


def _leave(code: int) -> NoReturn:
    """End this process without the interpreter's own end.

    Threads of torch's process groups can outlive these and abort it ("terminate called without an
    active exception"), which torchrun takes for a failure of a run that is done.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="meddinov3 pretrain",
        usage="meddinov3 pretrain CONFIG [CONFIG ...] --store DIR --out DIR [--stage N] "
        "[--steps N] [--init SOURCE] [--dry-run] [key=value ...]",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "words",
        nargs="+",
        metavar="CONFIG | key=value",
        help="vits16, vitb16, vitl16 or tiny (three stages each), one shipped stage such as "
        "vitb16_stage1, or your own YAML files in order; and changes to them, for one stage alone "
        "with stage1., stage2. or stage3. before the key",
    )
    add("--store", metavar="DIR", help="the slice store; data.store of the config by default")
    add("--out", type=Path, metavar="DIR", help="folder of the run; a stage writes to DIR/stageN")
    add(
        "--stage",
        choices=("1", "2", "3", "all"),
        default="all",
        help="which stages of the configs to run. Default: all",
    )
    add(
        "--steps",
        type=int,
        metavar="N",
        help="steps of each stage; warm-ups, exports, savings and the like follow. Default: as the "
        "config says",
    )
    add(
        "--init",
        metavar="SOURCE",
        help="where the first of them starts: none, a path, timm:NAME, hf:OWNER/REPO/FILE, "
        "a stage's folder. Default: as the config says",
    )
    add(
        "--dry-run",
        action="store_true",
        help="print sizes, memory and time, make one step, write nothing",
    )
    return parser
