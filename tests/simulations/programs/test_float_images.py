"""Programs take 8-bit pixels: a model that was trained on other numbers is refused."""

import pytest

import fedkn
from fedkn.errors import UserError
from simulations.programs.trained_model import load_trained_model


@pytest.mark.parametrize("scaling", ["standardized", "none"])
def test_a_model_of_float_images_makes_no_program_of_pixels(scaling, tmp_path, monkeypatch):
    (tmp_path / "floats.py").write_text(
        "from fedkn.data.sources import load\n"
        "def digits():\n"
        "    data = load('digits').train\n"
        "    return data.inputs.float() / 100 - 1, data.targets\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    result = fedkn.run(
        source="floats:digits",
        normalizer="group",
        rounds=1,
        clients=4,
        cohort=2,
        model={"width": 4},
        train={"local_steps": 2},
        data={"scaling": scaling},
        out=str(tmp_path / "run"),
        progress=False,
    )
    with pytest.raises(UserError, match="trained on float32 1x8x8, and programs are for images of"):
        load_trained_model(result.folder, None)
