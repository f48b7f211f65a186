import socket
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement

from fedkn.installation import installed_version
from simulations import doctor
from simulations.doctor import Finding, diagnose


class Usage(NamedTuple):
    total: int
    used: int
    free: int


class Memory(NamedTuple):
    available: int


def found(name: str, folder: Path = Path("runs")) -> Finding:
    (finding,) = [finding for finding in diagnose(folder) if finding.name == name]
    return finding


def test_this_installation_is_sound_and_every_complaint_has_a_fix() -> None:
    findings = diagnose(Path("runs"))
    assert not [finding for finding in findings if finding.status == "fail"]
    assert {"python", "torch", "flwr", "torchvision", "torchvision's import"} <= {
        finding.name for finding in findings
    }
    assert all(finding.fix for finding in findings if finding.status != "ok")


def test_an_unsupported_version_fails_and_names_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    versions: dict[str, str | None] = {"flwr": "1.42.0", "torch": "2.5.1+cu121", "scipy": None}
    monkeypatch.setattr(
        doctor, "installed_version", lambda name: versions.get(name, installed_version(name))
    )
    for name in ("flwr", "torch"):
        finding = found(name)
        assert finding.status == "fail"
        specifier = finding.fix.removeprefix("pip install '").removesuffix("'")
        assert Requirement(specifier).name == name
        assert not Requirement(specifier).specifier.contains(str(versions[name]).partition("+")[0])
    # Not part of the base install: a device does without.
    assert found("scipy").status == "warn"


def test_a_local_build_is_of_its_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", lambda name: "2.6.0+cpu")
    assert found("torch").status == "ok"


def test_a_torchvision_that_cannot_be_imported_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("undefined symbol\nand much more")

    monkeypatch.setattr(doctor, "import_torchvision", broken)
    finding = found("torchvision's import")
    assert (finding.status, finding.message) == ("fail", "RuntimeError: undefined symbol")


def test_a_port_in_use_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        monkeypatch.setattr(doctor, "_FLOWER_PORTS", {port: "a test"})
        assert found(f"port {port}").status == "warn"
    assert found(f"port {port}").status == "ok"


@pytest.mark.parametrize(("free", "status"), [(10 * 2**20, "fail"), (2**30, "warn"), (2**34, "ok")])
def test_little_disk(monkeypatch: pytest.MonkeyPatch, free: int, status: str) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(2**40, 0, free))
    assert found("disk").status == status


def test_a_folder_that_cannot_be_written_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert found("disk").status == "fail"
    assert found("FLWR_HOME").status == "warn"


def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory(2**29))
    finding = found("memory")
    assert finding.status == "warn"
    assert "--workers 1" in finding.fix


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def which(name: str) -> Any:
        return None

    monkeypatch.setattr("shutil.which", which)
    finding = found("native kernels")
    assert finding.status == "warn"
    assert "C++" in finding.message


def test_the_wish_for_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDKN_NATIVE", "0")
    assert "FEDKN_NATIVE=0" in found("native kernels").message
    monkeypatch.setenv("FEDKN_NATIVE", "autp")
    finding = found("native kernels")
    assert finding.status == "fail"
    assert "'auto'" in finding.message


def without_metadata(name: str) -> Any:
    raise metadata.PackageNotFoundError(name)


def test_a_checkout_that_was_never_installed_is_a_warning_and_is_checked_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "requires", without_metadata)
    monkeypatch.setattr(
        metadata, "version", lambda name: (without_metadata if name == "fedkn" else real)(name)
    )
    finding = found("fedkn")
    assert finding.status == "warn"
    assert "not installed" in finding.message
    assert "pip install -e" in finding.fix
    assert found("flwr").status == "ok"
    assert found("scipy").status == "ok"  # of the extra [simulation]


def test_code_that_was_copied_alone_says_what_it_cannot_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metadata, "requires", without_metadata)
    monkeypatch.setattr(metadata, "version", without_metadata)
    monkeypatch.setattr("fedkn.installation._project", dict)
    assert "is not known here" in found("fedkn").message
    assert found("python").status == "ok"


def test_fedkns_way_round_torchvision_is_not_called_working(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        doctor, "import_torchvision", lambda: SimpleNamespace(__version__="0.28.0+cu130")
    )
    for taken, status in ((True, "warn"), (False, "ok")):
        monkeypatch.setattr(doctor, "way_round_taken", lambda taken=taken: taken)
        finding = found("torchvision's import")
        assert finding.status == status
        assert ("fails by itself" in finding.message) == taken
