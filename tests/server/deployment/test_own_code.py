"""Which code of the user's goes into the bundle, and that it can be imported there alone."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from server.deployment.bundle import build_bundle
from server.deployment.own_code import NOTHING, own_code

NET = """
import os
from torch import nn
from own_blocks import block

def net(num_classes, in_channels):
    return nn.Sequential(block(in_channels), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, num_classes))
"""
BLOCKS = """
from torch import nn

def block(channels):
    return nn.Conv2d(channels, 4, 3)

def resized():
    import torchvision
    return torchvision.transforms
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_net.py").write_text(NET)
    (tmp_path / "own_blocks.py").write_text(BLOCKS)
    (tmp_path / "unrelated.py").write_text("raise SystemExit")
    package = tmp_path / "own_package" / "inner"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("from own_package.inner.norms import Mine\n")
    (package / "__init__.py").write_text("")
    (package / "norms.py").write_text("class Mine: ...\n")
    (package / "data.bin").write_bytes(b"no code")
    (package / ".hidden").mkdir()
    (package / ".hidden" / "x.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def configured(**settings: str) -> ExperimentConfig:
    return ExperimentConfig.resolve({k.replace("__", "."): v for k, v in settings.items()})


def test_a_run_of_fedkns_own_parts_carries_nothing():
    assert own_code(ExperimentConfig()) == NOTHING


@pytest.mark.usefixtures("folder")
def test_a_module_comes_with_those_beside_it_that_it_imports():
    found = own_code(configured(model__name="own_net:net"))
    assert set(found.files) == {"own_net.py", "own_blocks.py"}
    assert found.installed == ("torchvision",)
    lines = list(found.lines())
    assert lines[0].startswith("every device runs your own_blocks.py (1 file, 0.2 kB)")
    assert lines[-1] == "devices need torchvision installed: the bundle does not carry it"


@pytest.mark.usefixtures("folder")
def test_a_package_comes_whole_as_python_alone():
    found = own_code(configured(normalizer__name="own_package:Mine", model__name="own_net:net"))
    assert set(found.files) == {
        "own_net.py",
        "own_blocks.py",
        "own_package/__init__.py",
        "own_package/inner/__init__.py",
        "own_package/inner/norms.py",
    }
    assert any("own_package (3 files" in line for line in found.lines())


def test_what_a_package_index_has_is_not_carried():
    found = own_code(configured(model__name="torchvision.models:resnet18"))
    assert not found.files
    assert found.installed == ("torchvision",)


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(UserError, match="there is no module 'nowhere_at_all' here"):
        own_code(configured(model__name="nowhere_at_all:net"))


def test_too_much_is_refused(folder):
    (folder / "own_package" / "large.py").write_text("#" * 2_100_000)
    with pytest.raises(UserError, match="more than a bundle should carry"):
        own_code(configured(model__name="own_package:net"))


def test_what_flower_leaves_out_is_named(folder):
    (folder / "test_net.py").write_text(BLOCKS)
    own = own_code(configured(model__name="test_net:block"))
    with pytest.raises(UserError, match=r"leaves 'test_net\.py' out"):
        build_bundle(own)


@pytest.mark.usefixtures("folder")
def test_the_bundle_alone_builds_the_users_model(tmp_path_factory):
    bundle = build_bundle(own_code(configured(model__name="own_net:net")))
    device = tmp_path_factory.mktemp("device")
    with zipfile.ZipFile(BytesIO(bundle)) as archive:
        archive.extractall(device)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import fedkn; assert fedkn.__file__.startswith(sys.argv[1])\n"
        "from fedkn.config import ExperimentConfig\n"
        "from fedkn.experiment import build_model\n"
        "config = ExperimentConfig.resolve({'model.name': 'own_net:net'})\n"
        "print(sum(p.numel() for p in build_model(config).parameters()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, str(device)],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout.strip() == str(4 * 9 + 4 + 4 * 10 + 10), done.stderr
