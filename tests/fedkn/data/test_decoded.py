import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedkn.data.decoded import CACHE_FOLDER, Decoded, load_decoded
from fedkn.errors import UserError

_PIXELS = np.random.default_rng(0).integers(0, 256, (10, 3, 4, 5), dtype=np.uint8)


def _decode() -> Decoded:
    return Decoded(_PIXELS.shape, iter([_PIXELS[:6], _PIXELS[6:]]))


def _never() -> Decoded:
    raise AssertionError("decoded although a cache file exists")


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def test_written_once_then_mapped(root: Path) -> None:
    assert np.array_equal(load_decoded(root, "native", "k", _decode).images.numpy(), _PIXELS)
    mapped = load_decoded(root, "native", "k", _never).images
    assert np.array_equal(mapped.numpy(), _PIXELS)
    mapped.zero_()
    assert np.array_equal(load_decoded(root, "native", "k", _never).images.numpy(), _PIXELS)


def test_a_new_key_replaces_the_old_file_of_its_variant_only(root: Path) -> None:
    for variant, key in [("native", "1"), ("32px", "1"), ("native", "2")]:
        load_decoded(root, variant, key, _decode)
    names = sorted(path.name for path in (root / CACHE_FOLDER).glob("*.npy"))
    assert names == ["32px-1.npy", "native-2.npy"]


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"something else altogether"])
def test_damaged_file_is_decoded_anew(content: bytes, root: Path) -> None:
    load_decoded(root, "native", "k", _decode)
    (root / CACHE_FOLDER / "native-k.npy").write_bytes(content)
    assert np.array_equal(load_decoded(root, "native", "k", _decode).images.numpy(), _PIXELS)
    load_decoded(root, "native", "k", _never)


def test_cut_file_is_decoded_anew(root: Path) -> None:
    load_decoded(root, "native", "k", _decode)
    path = root / CACHE_FOLDER / "native-k.npy"
    os.truncate(path, path.stat().st_size - 1)
    assert np.array_equal(load_decoded(root, "native", "k", _decode).images.numpy(), _PIXELS)


def test_left_out_images_are_remembered(root: Path) -> None:
    def decode() -> Decoded:
        left_out: dict[int, str] = {}

        def chunks() -> Iterator[np.ndarray]:
            yield _PIXELS[:6]
            left_out.update({7: "is damaged", 6: "is empty"})
            yield _PIXELS[8:]

        return Decoded(_PIXELS.shape, chunks(), left_out)

    for how in (decode, _never):
        mapped = load_decoded(root, "native", "k", how)
        assert mapped.left_out == {6: "is empty", 7: "is damaged"}
        assert np.array_equal(mapped.images.numpy(), _PIXELS[[0, 1, 2, 3, 4, 5, 8, 9]])
    # It is an .npy file that others can read.
    (path,) = (root / CACHE_FOLDER).glob("*.npy")
    assert np.array_equal(np.load(path, mmap_mode="r"), _PIXELS[[0, 1, 2, 3, 4, 5, 8, 9]])


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255), cut=st.booleans())
def test_any_damage_is_noticed_said_and_mended(
    place: float, bits: int, cut: bool, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_decoded(root, "native", "k", _decode)
    path = root / CACHE_FOLDER / "native-k.npy"
    content = bytearray(path.read_bytes())
    index = int(place * len(content))
    if cut:
        del content[index:]
    else:
        content[index] ^= bits
    path.write_bytes(content)
    caplog.clear()
    assert np.array_equal(load_decoded(root, "native", "k", _decode).images.numpy(), _PIXELS)
    assert [record.getMessage().count("is damaged") for record in caplog.records] == [1]
    load_decoded(root, "native", "k", _never)


def test_unwritable_root_uses_the_users_cache(root: Path, cache_home: Path) -> None:
    (root / CACHE_FOLDER).write_text("a file where the folder should be")
    load_decoded(root, "native", "k", _decode)
    load_decoded(root, "native", "k", _never)
    assert len(list(cache_home.glob("fedkn/images/*/native-k.npy"))) == 1


def test_no_place_at_all(root: Path, cache_home: Path) -> None:
    (root / CACHE_FOLDER).write_text("x")
    cache_home.write_text("x")
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        load_decoded(root, "native", "k", _never)


def test_full_disk_is_told_before_writing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(root)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="are free"):
        load_decoded(root, "native", "k", _decode)
    assert not list(root.rglob("partial-*"))


def test_failing_write_is_told(root: Path) -> None:
    def chunks() -> Iterator[np.ndarray]:
        yield _PIXELS[:6]
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        load_decoded(root, "native", "k", lambda: Decoded(_PIXELS.shape, chunks()))


def test_failure_leaves_nothing_behind(root: Path) -> None:
    def chunks() -> Iterator[np.ndarray]:
        yield _PIXELS[:6]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_decoded(root, "native", "k", lambda: Decoded(_PIXELS.shape, chunks()))
    assert [path.name for path in (root / CACHE_FOLDER).iterdir()] == ["lock"]
    assert np.array_equal(load_decoded(root, "native", "k", _decode).images.numpy(), _PIXELS)


_WORKER = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    import numpy as np
    from fedkn.data.decoded import Decoded, load_decoded

    root, pause = Path(sys.argv[1]), float(sys.argv[2])

    def decode():
        (root / "decoding").open("a").write("x")
        def chunks():
            for value in range(4):
                yield np.full((2, 1, 3, 3), value, dtype=np.uint8)
                time.sleep(pause)
        return Decoded((8, 1, 3, 3), chunks())

    images = load_decoded(root, "native", "k", decode).images
    print(images[:, 0, 0, 0].tolist())
    """
)


def _worker(root: Path, pause: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _WORKER, str(root), str(pause)], stdout=subprocess.PIPE, text=True
    )


def test_concurrent_processes_decode_once_and_agree(root: Path) -> None:
    workers = [_worker(root, 0.2) for _ in range(3)]
    outputs = [worker.communicate()[0].strip() for worker in workers]
    assert outputs == ["[0, 0, 1, 1, 2, 2, 3, 3]"] * 3
    assert (root / "decoding").read_text() == "x"


def test_a_killed_process_is_cleaned_up_after(root: Path) -> None:
    worker = _worker(root, 60)
    while not list(root.rglob("partial-*")):
        assert worker.poll() is None
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    assert not list(root.rglob("*.npy"))
    assert np.array_equal(load_decoded(root, "native", "k", _decode).images.numpy(), _PIXELS)
    assert not list(root.rglob("partial-*"))
