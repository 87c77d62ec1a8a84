"""Fixtures of the tests of models: synthetic checkpoints and the message of a user's mistake."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nnunetv2_meddinov3.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
_spec = importlib.util.spec_from_file_location(
    "models_state_dicts", Path(__file__).with_name("state_dicts.py")
)
_state_dicts = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _state_dicts
_spec.loader.exec_module(_state_dicts)


@pytest.fixture(scope="session")
def state_dicts():
    """The helper module, which pytest's import mode cannot import by name."""
    return _state_dicts


@pytest.fixture(params=list(_state_dicts.FORMATS))
def checkpoint_format(request):
    """Every known format in turn."""
    return _state_dicts.FORMATS[request.param]


class Golden:
    """The recorded outputs of the original implementations."""

    cases = json.loads((GOLDEN / "golden.json").read_text())

    def path(self, case):
        return GOLDEN / f"{case}.weights.safetensors"

    def weights(self, case):
        return load_file(self.path(case))

    def recorded(self, case):
        return load_file(GOLDEN / f"{case}.{'output' if 'net' in case else 'features'}.safetensors")

    def norm_eps(self, case):
        return {"layernorm": 1e-6, "layernormbf16": 1e-5}[self.cases[case]["vit"]["norm_layer"]]


@pytest.fixture(scope="session")
def golden():
    return Golden()


@pytest.fixture
def mistake():
    """Calls a function that must refuse its input, and returns the one sentence it says."""

    def message(function, *arguments, **keywords):
        with pytest.raises(UserError) as caught:
            function(*arguments, **keywords)
        text = str(caught.value)
        assert "\n" not in text
        assert "Traceback" not in text
        assert len(text) > 20
        return text

    return message
