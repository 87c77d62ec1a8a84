"""A mistake of the user is its sentence alone: with a cause, in a thread, in another process."""

import os
import pickle
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import SpawnContext

import pytest

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models.resolve import parse_source

SENTENCE = "the file must exist, but there is none: check the path."


def run(program, folder):
    """Run a program from a file, as processes that it spawns import it again."""
    script = folder / "program.py"
    script.write_text(program)
    return subprocess.run(
        [sys.executable, "-W", "ignore", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_mistake_with_a_cause_hides_the_cause(tmp_path):
    done = run(
        "from nnunetv2_meddinov3.errors import UserError\n"
        "try:\n    open('nowhere')\n"
        f"except OSError as error:\n    raise UserError({SENTENCE!r}) from error\n",
        tmp_path,
    )
    assert (done.returncode, done.stderr) == (1, f"{SENTENCE}\n")


def test_a_mistake_in_a_thread_is_seen_and_other_errors_keep_their_traceback(tmp_path):
    """It was silent: threads drop a SystemExit, which UserError was."""
    done = run(
        "import threading\nfrom nnunetv2_meddinov3.errors import UserError\n"
        f"def fail():\n    raise UserError({SENTENCE!r})\n"
        "def crash():\n    raise ValueError('a bug')\n"
        "for target in (fail, crash):\n"
        "    thread = threading.Thread(target=target)\n    thread.start()\n    thread.join()\n",
        tmp_path,
    )
    assert done.returncode == 0
    assert done.stderr.startswith(f"{SENTENCE}\nException in thread")
    assert done.stderr.endswith("ValueError: a bug\n")


def test_a_mistake_comes_back_from_a_process_pool_as_itself():
    with ProcessPoolExecutor(1, SpawnContext()) as pool, pytest.raises(UserError) as caught:
        pool.submit(parse_source, "ftp:there").result()
    assert str(caught.value).startswith("weights must be a path, ")
    assert str(pickle.loads(pickle.dumps(UserError(SENTENCE)))) == SENTENCE


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["UserError", "ValueError"])
def test_a_mistake_in_a_spawned_process_of_torch_is_its_sentence(kind, tmp_path):
    """nnU-Net's training on several GPUs runs the trainer in such processes."""
    done = run(
        "import torch\nfrom nnunetv2_meddinov3.errors import UserError\n"
        f"def fail(rank):\n    raise {kind}({SENTENCE!r})\n"
        "if __name__ == '__main__':\n    torch.multiprocessing.spawn(fail, nprocs=2)\n",
        tmp_path,
    )
    assert done.returncode == 1
    if kind == "UserError":
        lines = done.stderr.splitlines()
        assert [line for line in lines if not re.match(r"W\d{4} ", line)] == [
            SENTENCE
        ]  # torch's log
    else:
        assert "Traceback (most recent call last):" in done.stderr
