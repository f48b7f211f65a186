from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from fedkn import references
from fedkn.errors import UserError
from fedkn.references import find, is_reference, registered

OWN = {"resnet8": 8, "vgg6": 6}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder of its own, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]
    importlib.invalidate_caches()


def test_a_name_of_our_own_is_found():
    assert find("model", "vgg6", OWN) == 6


def test_a_file_of_the_current_folder_is_found(folder: Path):
    (folder / "my_networks_a.py").write_text("class Nets:\n    small = 'small'\nnet = 3\n")
    assert find("model", "my_networks_a:net", OWN) == 3
    assert find("model", "my_networks_a:Nets.small", OWN) == "small"


def test_the_current_folder_hides_no_installed_module(folder: Path):
    (folder / "json.py").write_text("loads = 'not the library'\n")
    sys.modules.pop("json.tool", None)
    assert find("model", "json:loads", OWN) is importlib.import_module("json").loads
    assert str(folder) not in sys.path


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(UserError, match="unknown model 'resnet9': did you mean 'resnet8'"):
        find("model", "resnet9", OWN)


@pytest.mark.parametrize(
    ("text", "reference", "said"),
    [
        (None, "my_absent_module:net", "no module 'my_absent_module' here"),
        ("import my_absent_dependency", "my_b:net", "no module 'my_absent_dependency' here"),
        ("other = 1", "my_c:net", r"has no attribute 'net' \(it has other\)"),
        ("x = 1\nx / 0", "my_d:net", r"ZeroDivisionError.*my_d\.py, line 2"),
        ("def broken(:", "my_e:net", "SyntaxError"),
        ("raise ValueError('\\x1b[31mred')", "my_f:net", r"\\x1b\[31mred"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(
    folder: Path, text: str | None, reference: str, said: str
):
    if text is not None:
        (folder / f"{reference.partition(':')[0]}.py").write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        find("model", reference, OWN)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("a:b", True),
        ("a.b:c.d", True),
        ("resnet8", False),
        ("a:", False),
        (":b", False),
        ("a:b:c", False),
        ("../a:b", False),
        ("dirichlet:alpha=0.3", False),
    ],
)
def test_what_a_reference_looks_like(name: str, answer: bool):
    assert is_reference(name) is answer


def test_packages_register_parts(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A real distribution's metadata, as pip writes them, with an entry point of each kind."""
    (folder / "my_package_g.py").write_text("net = 'theirs'\nmine = 'a strategy'\n")
    info = folder / "my_package_g-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package-g\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[fedkn.models]\ntheirnet = my_package_g:net\nvgg6 = my_package_g:net\n"
        "[fedkn.strategies]\nmine = my_package_g:mine\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    references._registered.cache_clear()
    try:
        assert registered("model") == ("theirnet", "vgg6")
        assert find("model", "theirnet", OWN) == "theirs"
        assert find("strategy", "mine", {}) == "a strategy"
        assert find("model", "vgg6", OWN) == 6  # ours, whoever registers it again
        with pytest.raises(UserError, match="did you mean 'theirnet'"):
            find("model", "theirnets", OWN)
    finally:
        references._registered.cache_clear()
