"""The examples of docs/data.md, as they stand there."""

import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from fedkn.config import ExperimentConfig
from fedkn.experiment import data_summary, federated_data

_PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")


@pytest.fixture
def blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mapping[str, str]]:
    """The blocks that say what file they are; the Python ones can be imported."""
    found = dict(re.findall(r"```(?:python|toml)\n# ([\w.]+)\n(.*?)```", _PAGE, re.DOTALL))
    assert found.keys() == {"mydata.py", "natural.toml"}
    (tmp_path / "mydata.py").write_text(found["mydata.py"])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mydata", raising=False)  # another page's, of the same name
    yield found
    sys.modules.pop("mydata", None)


def test_natural_clients_of_own_data(blocks: Mapping[str, str]) -> None:
    config = ExperimentConfig.resolve(tomllib.loads(blocks["natural.toml"]))
    data = federated_data(config)
    assert data.train.inputs.dtype == torch.float32
    assert data.train.classes == ("slow", "middle", "fast")
    assert data.train.origins is not None
    for client, part in enumerate(data.parts):
        assert (data.train.origins.ids[part] == client).all()
    # Validation and tests have examples of all.
    for held in (data.validation, data.test):
        assert held.origins is not None
        assert len(torch.unique(held.origins.ids)) == 10
    assert sum(map(len, data.parts)) + len(data.validation) + len(data.test) == 300


def test_numbers_to_be_predicted(blocks: Mapping[str, str]) -> None:
    config = ExperimentConfig.resolve(
        {
            "data.source": "mydata:squares",
            "task.name": "regression",
            "partition.scheme": "iid",
            "partition.clients": 5,
        }
    )
    data, summary = federated_data(config), data_summary(config)
    assert data.train.classes == ()
    assert np.array_equal(data.train.targets, data.train.inputs[:, 0, 0, 0])
    assert (summary.dtype, summary.target_dtype, summary.target_shape) == ("float32", "float32", ())
