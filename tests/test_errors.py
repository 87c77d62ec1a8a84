"""A mistake of the user's is one sentence, wherever it is raised; other errors are quoted."""

import os
import pickle
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.context import SpawnContext

import pytest

from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.models.resolve import parse_source

SENTENCE = "the file must exist, but there is none: check the path."


def run(body):
    return subprocess.run(
        [sys.executable, "-c", f"from nnunetv2_meddinov3.errors import UserError\n{body}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_uncaught_it_prints_its_sentence_alone_and_ends_with_code_1():
    done = run("raise UserError('The size must be even, got 7: use 8.')")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "The size must be even, got 7: use 8.\n"


def test_any_other_error_keeps_its_traceback():
    done = run("raise ValueError('not ours')")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ValueError: not ours\n")


def test_a_handler_that_was_there_before_still_shows_other_errors():
    lines = [
        "import sys",
        "sys.excepthook = lambda *_: print('mine')",
        "import nnunetv2_meddinov3.errors",
        "raise KeyError('x')",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "mine\n"


def test_an_ordinary_handler_catches_it_and_a_pool_hands_it_on():
    def work():
        raise UserError("The size must be even.")

    assert issubclass(UserError, ValueError)
    assert not issubclass(UserError, SystemExit)
    with ThreadPoolExecutor(1) as pool, pytest.raises(Exception, match="must be even"):
        pool.submit(work).result()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "file"), "No space left on device"),
        (ValueError("first\nsecond"), "first"),
        (ValueError("  a sentence.  \n"), "a sentence"),
        (KeyError(), "KeyError"),
        (RuntimeError("   "), "RuntimeError"),
        (RuntimeError("x" * 500), "x" * 200),
        (
            RuntimeError(
                "Exception thrown in SimpleITK ImageFileReader_Execute: sitkReader.cxx:99:\n"
                'sitk::ERROR: Unable to determine ImageIO reader for "a.nii"'
            ),
            'Unable to determine ImageIO reader for "a.nii"',
        ),
    ],
)
def test_the_first_line_of_an_error(error, said):
    assert first_line(error) == said


def run_file(program, folder):
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
    done = run_file(
        "from nnunetv2_meddinov3.errors import UserError\n"
        "try:\n    open('nowhere')\n"
        f"except OSError as error:\n    raise UserError({SENTENCE!r}) from error\n",
        tmp_path,
    )
    assert (done.returncode, done.stderr) == (1, f"{SENTENCE}\n")


def test_a_mistake_in_a_thread_is_seen_and_other_errors_keep_their_traceback(tmp_path):
    """It was silent: threads drop a SystemExit, which UserError was."""
    done = run_file(
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
    done = run_file(
        "import torch\nfrom nnunetv2_meddinov3.errors import UserError\n"
        f"def fail(rank):\n    raise {kind}({SENTENCE!r})\n"
        "if __name__ == '__main__':\n    torch.multiprocessing.spawn(fail, nprocs=2)\n",
        tmp_path,
    )
    assert done.returncode == 1
    if kind == "UserError":
        lines = done.stderr.splitlines()
        assert [line for line in lines if not re.match(r"W\d{4} ", line)] == [SENTENCE]
    else:
        assert "Traceback (most recent call last):" in done.stderr
