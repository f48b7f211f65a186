import sys

import pytest
import torch
from packaging.version import Version
from torch import nn

from fedkn import normalizers
from fedkn.errors import FedknError, UserError
from fedkn.models import export as exporting
from fedkn.models.blocks import Halve
from fedkn.models.export import export


def net(name, **options):
    make = normalizers.create(name, **options)
    return nn.Sequential(
        make.conv_norm(1, 4, 3, stride=2, padding=1, activation="relu"),
        Halve(),
        make.with_settings(dropout_p=0.2).norm(4),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


@pytest.mark.parametrize("name", ["kernel", "batch", "ws_group"])
def test_pt2_runs_on_any_batch_and_gives_the_models_outputs(name, tmp_path):
    model = net(name)
    difference = export(model, torch.randn(1, 1, 12, 12), tmp_path / "net.pt2", to="pt2")
    assert difference < 1e-5
    assert model.training
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    x = torch.randn(7, 1, 12, 12)
    torch.testing.assert_close(loaded(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["net.pt2"]


OLD = Version(torch.__version__) < Version("2.7")
BATCH = pytest.param("batch", marks=pytest.mark.skipif(OLD, reason="refused by torch 2.6"))


@pytest.mark.parametrize("name", ["kernel", BATCH])
def test_onnx_runs_on_any_batch_and_gives_the_models_outputs(name, tmp_path, capfd):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = net(name)
    assert export(model, torch.randn(2, 1, 12, 12), tmp_path / "net.onnx") < 1e-5
    assert "".join(capfd.readouterr()) == ""
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"))
    x = torch.randn(7, 1, 12, 12)
    (seen,) = session.run(None, {"images": x.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(seen), model.eval()(x).detach(), rtol=1e-4, atol=1e-5
    )
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


class Unheard(nn.Module):
    def forward(self, x):
        return torch.ops.aten.special_airy_ai(x.mean((2, 3)))


def test_what_onnx_cannot_say_is_refused_in_a_line(tmp_path):
    pytest.importorskip("onnxscript")
    with pytest.raises(UserError, match=r"cannot convert this model to ONNX \(.+\): .* to pt2$"):
        export(Unheard(), torch.randn(2, 1, 4, 4), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
    assert export(Unheard(), torch.randn(2, 1, 4, 4), tmp_path / "net.pt2", to="pt2") < 1e-5


class Fickle(nn.Module):
    """Other outputs at each call, as a wrong export would have."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.scale * x.mean((2, 3)) + float(torch.compiler.is_compiling())


def test_a_file_with_other_outputs_is_not_written(tmp_path):
    with pytest.raises(FedknError, match="differ"):
        export(Fickle(), torch.randn(2, 1, 4, 4), tmp_path / "net.pt2", to="pt2")
    assert not list(tmp_path.iterdir())


class Noisy(Fickle):
    def forward(self, x):
        return self.scale * x.mean((2, 3)) + torch.rand(x.shape[1])


@pytest.mark.parametrize("model", [Noisy, lambda: Always(0.5)])
def test_a_model_whose_evaluation_is_random_is_refused(model, tmp_path):
    with pytest.raises(UserError, match="another output each time"):
        export(model(), torch.rand(2, 1, 4, 4), tmp_path / "net.pt2", to="pt2")
    assert not list(tmp_path.iterdir())


class Always(nn.Dropout):
    def forward(self, x):
        return nn.functional.dropout(x.flatten(1), self.p, training=True)


def test_bad_input(tmp_path, monkeypatch):
    x = torch.randn(2, 1, 12, 12)
    with pytest.raises(UserError, match="did you mean 'onnx'"):
        export(net("none"), x, tmp_path / "net", to="onx")
    with pytest.raises(UserError, match="does not exist"):
        export(net("none"), x, tmp_path / "no" / "net.pt2", to="pt2")
    with pytest.raises(UserError, match=r"images of shape \(2, 5, 12, 12\)"):
        export(net("none"), torch.randn(2, 5, 12, 12), tmp_path / "net.pt2", to="pt2")
    with pytest.raises(UserError, match="build the model with 'expected'"):
        export(net("kernel", eval_mode="stochastic"), x, tmp_path / "net.pt2", to="pt2")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"pip install 'fedkn\[export\]'"):
        export(net("none"), x, tmp_path / "net.onnx", to="onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(OLD, reason="torch 2.6 writes few networks as ONNX")
def test_each_step_is_told_when_it_begins(tmp_path):
    said = []
    export(net("kernel"), torch.randn(2, 1, 12, 12), tmp_path / "net.onnx", say=said.append)
    assert said == [
        "recording what the model computes",
        "converting it to ONNX",
        "simplifying the program",
        "comparing the program's outputs with the model's",
    ]


@pytest.mark.skipif(OLD, reason="torch 2.6 writes few networks as ONNX")
def test_a_program_for_onnx_is_recorded_without_autocasts_regions(tmp_path, monkeypatch):
    counts = []

    def program(model, example):
        recorded = real(model, example)
        counts.append(sum("autocast" in str(node.target) for node in recorded.graph.nodes))
        return recorded

    real = exporting._program
    monkeypatch.setattr(exporting, "_program", program)
    for name in ("onnx", "pt2"):  # of which the second may be run under autocast
        export(net("kernel"), torch.randn(2, 1, 12, 12), tmp_path / f"net.{name}", to=name)
    assert counts[0] == 0 < counts[1]
