"""What is taken out of a run's files before they are kept, and what is not."""

import pytest

from simulations.runs.publishing import _without_paths


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("fedkn run /home/me/mine.toml --root ~/data/x", "fedkn run PATH --root PATH"),
        ("--out='/tmp/a b/c'", "--out='PATH b/c'"),
        ("cannot read /data/images/", "cannot read PATH"),
        ("see https://arxiv.org/abs/2505.21877", "see https://arxiv.org/abs/2505.21877"),
        ("package.module:Net, 3 of 4, 1/2, and/or, 2026/11/26", None),
        ("Linux 6.18 x86_64", None),
    ],
)
def test_whole_paths_are_taken_out_of_texts_and_nothing_else(text, kept):
    assert _without_paths(text) == (text if kept is None else kept)


def test_settings_that_name_a_place_are_emptied_wherever_they_stand():
    line = {"config": {"data.root": "/a/b", "checkpoint.folder": "/a/c", "data.source": "mnist"}}
    assert _without_paths(line)["config"] == {
        "data.root": "",
        "checkpoint.folder": "",
        "data.source": "mnist",
    }
    record = {"data": [{"settings": {"root": "/a/b", "source": "mnist"}, "shape": [1, 8, 8]}]}
    assert _without_paths(record)["data"][0]["settings"]["root"] == ""
    assert _without_paths(record)["data"][0]["shape"] == [1, 8, 8]
