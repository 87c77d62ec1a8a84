"""Runs other commands: each is shown, logged, followed, and explained if it fails."""

import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.progress import Progress

TAIL_LINES = 15  # of the log of a failed step
_CLEAR = "\r\x1b[K"  # back to the start of the line, which is emptied


def find_command(name: str) -> str:
    """Return the path of an installed command, first beside this Python, then on PATH.

    Raises:
        UserError: If there is none.
    """
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        raise UserError(
            f"The command {name} must be installed, but it is neither beside {sys.executable} nor "
            "on PATH; install nnunetv2 into this environment."
        )
    return found


def run_step(
    title: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    training_folder: Path | None = None,
) -> None:
    """Echo a command, run it to its end and show how far it is.

    On a terminal a line or a bar is redrawn; elsewhere only finished epochs are printed.

    Args:
        title: What the step does, for the reader.
        command: Name of an installed command and its arguments.
        environment: The whole environment of the command.
        log: File for everything the command says.
        training_folder: Folder of the fold that is trained, if the step is a training.

    Raises:
        UserError: If the command fails, with the last lines of its log.
    """
    executable = find_command(command[0])
    print(f"\n{title}\n  $ {shlex.join(command)}", flush=True)
    start = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    with (
        contextlib.closing(_Display(training_folder)) as display,
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            [executable, *command[1:]],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:  # universal newlines: a redrawn progress bar is many lines
                file.write(line)
                file.flush()
                if line.strip():
                    tail.append(line.rstrip())
                    display.show(line)
        except BaseException:  # Ctrl-C must not leave a training behind
            process.terminate()
            raise
    if process.returncode != 0:
        lines = "\n".join(f"  | {line}" for line in tail)
        raise UserError(
            f"{command[0]} failed with exit code {process.returncode}; its whole log is {log}, and "
            f"`meddinov3 doctor` checks the installation. Its last lines:\n{lines}"
        )
    print(f"  done in {time.monotonic() - start:.0f} s", flush=True)


class _Display:
    """Shows how far a command is: a training's epochs, else the last line on a terminal."""

    def __init__(self, training_folder: Path | None) -> None:
        self._training_folder = training_folder
        self._redraw = sys.stdout.isatty()
        self._epochs: Progress | None = None
        self._facts: dict[str, str] = {}

    def show(self, line: str) -> None:
        if self._training_folder is not None and re.search(r": Epoch 0\s*$", line):
            self.close()
            total = _num_epochs(self._training_folder)
            self._epochs = Progress(total, "epochs", title="  trained", stream=sys.stdout)
        elif self._epochs is not None:
            self._follow(line, self._epochs)
        elif self._redraw:
            width = shutil.get_terminal_size().columns - 1
            print(f"{_CLEAR}{f'  {line.strip()}'[:width]}", end="", flush=True)

    def close(self) -> None:
        if self._epochs is not None:
            self._epochs.close()
            self._epochs = None
        elif self._redraw:
            print(_CLEAR, end="", flush=True)

    def _follow(self, line: str, epochs: Progress) -> None:
        """Keep what a line of nnU-Net's training log says, until one closes an epoch."""
        if loss := re.search(r"train_loss (\S+)", line):
            self._facts["loss"] = loss[1]
        elif "Pseudo dice [" in line:
            per_class = [float(number) for number in re.findall(r"\d\.\d+", line.split("[")[1])]
            if per_class:
                self._facts["pseudo Dice"] = f"{sum(per_class) / len(per_class):.3f}"
        elif seconds := re.search(r"Epoch time: (\S+) s", line):
            self._facts["s per epoch"] = seconds[1]
            epochs.advance(", ".join(f"{name} {value}" for name, value in self._facts.items()))
            if epochs.done == epochs.total:  # nnU-Net goes on to validate
                self.close()


def _num_epochs(training_folder: Path) -> int | None:
    """Return the epochs of the running training, from nnU-Net's description of its trainer."""
    try:
        description = json.loads((training_folder / "debug.json").read_text(encoding="utf-8"))
        return int(description["num_epochs"])
    except (OSError, ValueError, KeyError):
        return None
