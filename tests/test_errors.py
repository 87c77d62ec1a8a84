"""A mistake of the user's is one sentence; what others raise is quoted by its first line."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from nnunetv2_meddinov3.errors import UserError, first_line


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


def test_in_a_thread_it_is_not_silent():
    # It was a SystemExit once, which threads swallow.
    done = run(
        "import threading\n"
        "def work(): raise UserError('The size must be even, got 7: use 8.')\n"
        "thread = threading.Thread(target=work)\nthread.start()\nthread.join()\n"
    )
    assert "The size must be even, got 7: use 8." in done.stderr


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
