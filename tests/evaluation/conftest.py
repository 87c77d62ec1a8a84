"""Where predictions, their references and the images lie."""

import pytest


@pytest.fixture
def folders(tmp_path):
    for name in ("predictions", "labels", "images"):
        (tmp_path / name).mkdir()
    return tmp_path
