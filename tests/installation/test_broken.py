"""What happens to nnU-Net, and to the interpreter, when our package is broken."""

import pytest

pytestmark = pytest.mark.slow

TRAINER = "MedDINOv3Trainer"


@pytest.fixture
def break_file(installed):
    """Breaks an installed file for one test."""
    saved = {}

    def put(name, text):
        path = installed.site_packages / "nnunetv2_meddinov3" / name
        saved[path] = path.read_bytes()
        path.write_text(text)

    yield put
    for path, data in saved.items():
        path.write_bytes(data)


def test_a_broken_trainer_of_ours_leaves_the_stock_trainers_alone(installed, break_file):
    break_file("trainers/meddinov3_trainers.py", "class MedDINOv3Trainer(:\n")
    stock, variant, ours = installed.where("nnUNetTrainer", "nnUNetTrainer_1epoch", TRAINER)
    assert stock.endswith(".nnUNetTrainer")
    assert variant.endswith(".nnUNetTrainer_1epoch")
    assert ours.startswith(f"UserError: {TRAINER} cannot be used: ")
    assert "SyntaxError" in ours
    assert "meddinov3_trainers.py" in ours


def test_a_broken_trainer_of_ours_is_one_sentence_under_the_stock_command(installed, break_file):
    break_file("trainers/meddinov3_trainers.py", "import no_such_package_xyz\n")
    arguments = ["999", "2d", "0", "-tr", TRAINER, "-device", "cpu"]
    train = installed.stock_command("nnUNetv2_train", *arguments)
    assert train.returncode == 1
    (sentence,) = train.stderr.splitlines()
    assert "no_such_package_xyz" in sentence


@pytest.mark.parametrize("text", ["def broken(:\n", "import no_such_package_xyz\n", ""])
def test_a_broken_start_leaves_the_interpreter_alone(installed, break_file, text):
    break_file("discovery.py", text)
    process = installed.process("-c", "print('started')")
    assert (process.returncode, process.stdout, process.stderr) == (0, "started\n", "")
