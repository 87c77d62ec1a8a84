"""Runs other commands: each is shown, logged, followed, and explained if it fails."""

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

TAIL_LINES = 15  # of the log of a failed step


def find_command(name: str) -> str:
    """Path of an installed command, first beside this Python, then on PATH.

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

    On a terminal one line is redrawn; elsewhere only finished epochs are printed.

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
    display = _Display(training_folder)
    log.parent.mkdir(parents=True, exist_ok=True)
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    with (
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
            for line in process.stdout:  # universal newlines: a redrawn progress bar is many lines
                file.write(line)
                file.flush()
                if line.strip():
                    tail.append(line.rstrip())
                    display.show(line)
        except BaseException:  # Ctrl-C must not leave a training behind
            process.terminate()
            raise
    display.clear()
    if process.returncode != 0:
        lines = "\n".join(f"  | {line}" for line in tail)
        raise UserError(
            f"{command[0]} failed with exit code {process.returncode}; its whole log is {log}, and "
            f"`meddinov3 doctor` checks the installation. Its last lines:\n{lines}"
        )
    print(f"  done in {time.monotonic() - start:.0f} s", flush=True)


class _Display:
    """One line that says how far a command is, drawn from what nnU-Net prints."""

    def __init__(self, training_folder: Path | None) -> None:
        self._training_folder = training_folder
        self._redraw = sys.stdout.isatty()
        self._epoch = 0
        self._facts: dict[str, str] = {}

    def show(self, line: str) -> None:
        if self._training_folder is not None and self._note(line):
            self._put(self._epoch_line(), lasting=not self._redraw)
        elif self._training_folder is None or self._epoch == 0 or self._is_finished():
            self._put("  " + line.strip(), lasting=False)

    def clear(self) -> None:
        if self._redraw:
            print("\r\x1b[K", end="", flush=True)

    def _put(self, text: str, lasting: bool) -> None:
        if lasting:
            print(text, flush=True)
        elif self._redraw:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text[:width]}", end="", flush=True)

    def _note(self, line: str) -> bool:
        """Keep what a line of nnU-Net's training log says; whether it closes an epoch."""
        if loss := re.search(r"train_loss (\S+)", line):
            self._facts["loss"] = loss[1]
        elif "Pseudo dice [" in line:
            per_class = [float(number) for number in re.findall(r"\d\.\d+", line.split("[")[1])]
            if per_class:
                self._facts["pseudo Dice"] = f"{sum(per_class) / len(per_class):.3f}"
        elif seconds := re.search(r"Epoch time: (\S+) s", line):
            self._facts["s per epoch"] = seconds[1]
            self._epoch += 1
            return True
        return False

    def _epoch_line(self) -> str:
        total = self._num_epochs()
        facts = "  ".join(f"{name} {value}" for name, value in self._facts.items())
        if total is None:
            return f"  epoch {self._epoch}  {facts}"
        filled = 24 * self._epoch // total
        bar = f"[{'#' * filled}{'.' * (24 - filled)}] " if self._redraw else ""
        return f"  {bar}epoch {self._epoch}/{total}  {facts}"

    def _is_finished(self) -> bool:
        return self._epoch == self._num_epochs()

    def _num_epochs(self) -> int | None:
        """Epochs of the running training, from the file in which nnU-Net describes its trainer."""
        try:
            description = json.loads((self._training_folder / "debug.json").read_text("utf-8"))
            return int(description["num_epochs"])
        except (OSError, ValueError, KeyError):
            return None
