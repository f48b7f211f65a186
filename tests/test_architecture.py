"""The house rules that can be checked: who imports whom, how long a file is, what has a name."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("fedkn", "clients", "server", "simulations")
SOURCES = sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def imported(path: Path) -> set[str]:
    """Return the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} has a relative import"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_import_linters_contracts_hold():
    pytest.importorskip("importlinter")
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kept = re.search(r"Contracts: (\d+) kept, 0 broken", done.stdout)
    assert kept, done.stdout
    assert int(kept[1]) >= 3


def test_the_arrows_point_one_way():
    """The same by hand, so that a contract dropped from pyproject.toml does not go unnoticed."""
    may_not = {
        "fedkn": {"clients", "server", "simulations"},
        "clients": {"server", "simulations"},
        "server": {"clients", "simulations"},
    }
    for path in SOURCES:
        package = name_of(path).split("/", 1)[0]
        wrong = {name for name in imported(path) if name.split(".")[0] in may_not.get(package, ())}
        assert not wrong, f"{name_of(path)} imports {sorted(wrong)}"


def test_inside_fedkn_flower_is_imported_in_one_file():
    with_flower = {
        name_of(path)
        for path in SOURCES
        if name_of(path).startswith("fedkn/")
        and any(name.split(".")[0] == "flwr" for name in imported(path))
    }
    assert with_flower == {"fedkn/federation.py"}


def test_importing_the_library_does_not_import_flower_ray_or_torchvision():
    code = (
        "import sys, json, fedkn, fedkn.models, fedkn.training, fedkn.normalizers, fedkn.data; "
        "print(json.dumps([m for m in ('flwr', 'ray', 'torchvision', 'sklearn') "
        "if m in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_is_no_longer_than_400_lines_and_says_what_it_is(path):
    text = path.read_text(encoding="utf-8")
    # A table of packed data at the end of a module is not code.
    assert text.partition('\n_TABLE = """')[0].count("\n") <= 400
    assert ast.get_docstring(ast.parse(text)), "no module docstring"
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)


# The ages of a process and of a heartbeat, which psutil and the SuperLink tell by the wall clock;
# and a check of that very clock.
WALL_CLOCK_WANTED = {
    *("server/deployment/status.py", "server/rounds/heartbeats.py"),
    "clients/device/connection.py",
}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_duration_is_taken_from_the_wall_clock(path):
    """A time of the day is written into a log as it is; what is subtracted is monotonic."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    read = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "time.time"
    ]
    computed = [node.lineno for node in read if not isinstance(parents[node], ast.keyword)]
    assert not computed or name_of(path) in WALL_CLOCK_WANTED, f"lines {computed}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_what_only_linux_has_is_asked_for_before_it_is_used(path):
    """A function that other systems lack stands beside a look for it, or for the system."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    used = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    } & ONLY_LINUX
    guarded = "hasattr(os" in text or "sys.platform" in text
    assert not used or guarded, f"{sorted(used)} without a look for it"


ONLY_LINUX = {
    f"os.{name}"
    for name in (
        *("sched_getaffinity", "sched_setaffinity", "memfd_create", "eventfd", "pidfd_open"),
        *("posix_fallocate", "posix_fadvise", "copy_file_range", "splice", "getrandom", "setns"),
        *("unshare", "pipe2", "fdatasync", "sched_setscheduler", "getresuid", "setresuid"),
        *("MFD_CLOEXEC", "getxattr", "setxattr", "sched_param"),
    )
} | {
    f"{module}.{name}"
    for module, names in {
        "signal": ("SIGRTMIN", "SIGRTMAX", "SIGSTKFLT", "SIGPWR", "sigtimedwait", "sigwaitinfo"),
        "select": ("epoll", "poll"),
        "socket": ("AF_NETLINK", "AF_VSOCK", "AF_PACKET", "SO_PEERCRED", "TCP_USER_TIMEOUT"),
        "resource": ("prlimit", "RLIMIT_RTPRIO", "RLIMIT_MSGQUEUE"),
        "mmap": ("MAP_POPULATE", "MAP_NORESERVE"),
        "fcntl": ("F_OFD_SETLK", "F_SETPIPE_SZ", "F_ADD_SEALS"),
    }.items()
    for name in names
}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_public_names_are_declared_and_exist(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    declared = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets)
    ]
    definitions = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    if not declared:
        assert not definitions, f"{definitions} are public, but there is no __all__"
        return
    (names,) = declared
    assert len(set(names)) == len(names)
    bound = {
        name.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        for name in [node]
    }
    bound |= {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    bound |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    lazy = any(isinstance(n, ast.FunctionDef) and n.name == "__getattr__" for n in tree.body)
    assert lazy or set(names) <= bound, sorted(set(names) - bound)
