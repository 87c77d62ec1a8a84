"""A scan with a mark in a known place, written in any orientation, and tiny weights."""

import json
import shutil
import socket
import subprocess
import time

import numpy as np
import pytest
import SimpleITK as sitk

SPACING = (1.0, 1.0, 3.0)  # x, y, z in mm


@pytest.fixture(scope="session")
def weights(tmp_path_factory, released_file):
    """A random ViT in the format of MedDINOv3's release, which states no contract."""
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    released_file(path)
    return str(path)


@pytest.fixture(scope="session")
def other_weights(tmp_path_factory, released_file):
    """Another random ViT."""
    path = tmp_path_factory.mktemp("weights") / "other.pth"
    released_file(path, seed=1)
    return str(path)


@pytest.fixture(scope="session")
def marked_ct():
    """A CT (6, 96, 128) in LPS: tissue in air, with a bright block that no symmetry hides."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:96j, -1:1:128j]
    body = (x / 0.9) ** 2 + (y / 0.8) ** 2 < 1
    array = np.where(body, 40, -1000) + generator.normal(0, 10, (6, 96, 128))
    array[2:4, 32:48, 80:96] = 900  # patches of 16 pixels
    image = sitk.GetImageFromArray(np.rint(array).astype(np.int16))
    image.SetSpacing(SPACING)
    image.SetOrigin((-60.0, -50.0, 10.0))
    return image


@pytest.fixture(scope="session")
def oriented():
    """A function that writes a scan with its axes in another order, such as "RSA", or turned."""

    def write(path, image, letters="LPS", degrees=0.0):
        turned = sitk.DICOMOrient(image, letters)
        if degrees:
            angle = np.radians(degrees)
            rotation = np.array(
                [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
            )
            direction = rotation @ np.reshape(turned.GetDirection(), (3, 3))
            turned.SetDirection(direction.ravel().tolist())
        path.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(turned, str(path))
        return path

    return write


class Firefox:
    """A browser of its own profile, driven by its own protocol: JSON after its length.

    Args:
        program: Path of the browser.
        profile: An empty folder.
    """

    def __init__(self, program, profile):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        (profile / "user.js").write_text(f'user_pref("marionette.port", {port});\n')
        command = [program, "--headless", "--marionette", "--no-remote", "--profile", profile]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, **silent)
        end = time.monotonic() + 60
        while True:
            try:
                self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)
        self._unread, self._number = b"", 0
        self._read()
        self.ask("WebDriver:NewSession")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._socket.close()
        self._process.terminate()
        self._process.wait(30)

    def ask(self, name, **parameters):
        self._number += 1
        text = json.dumps([0, self._number, name, parameters]).encode()
        self._socket.sendall(b"%d:%s" % (len(text), text))
        _, _, error, value = self._read()
        assert not error, error
        return value

    def run(self, script):
        return self.ask("WebDriver:ExecuteScript", script=script, args=[])["value"]

    def click(self, x, y):
        self._act("pointer", [{"type": "pointerMove", "x": round(x), "y": round(y)}], button=0)

    def press(self, key):
        self._act("key", [], value=key)

    def _act(self, kind, before, **what):
        both = [{"type": f"{kind}{way}", **what} for way in ("Down", "Up")]
        actions = [{"type": kind, "id": kind, "actions": [*before, *both]}]
        self.ask("WebDriver:PerformActions", actions=actions)

    def _read(self):
        while b":" not in self._unread:
            self._unread += self._received()
        size, _, rest = self._unread.partition(b":")
        while len(rest) < int(size):
            rest += self._received()
        self._unread = rest[int(size) :]
        return json.loads(rest[: int(size)])

    def _received(self):
        data = self._socket.recv(65536)
        assert data, "the browser has gone"
        return data


@pytest.fixture
def firefox(tmp_path):
    """Firefox without a window, where there is one."""
    program = shutil.which("firefox") or shutil.which("firefox-esr")
    if program is None:
        pytest.skip("needs Firefox")
    profile = tmp_path / "profile"
    profile.mkdir()
    with Firefox(program, profile) as browser:
        yield browser
