import pickle
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedkn import models, normalizers
from fedkn.errors import UserError


def knresnet(depth=18, normalizer="kernel", **changes):
    settings = {"num_classes": 7, "in_channels": 3, "width": 8, "low_resolution": False} | changes
    return models.build(f"knresnet{depth}", normalizer=normalizers.create(normalizer), **settings)


def authors_name(key, depth):
    """Our key in the authors' scheme, written independently of the loader's patterns."""
    part, *rest = key.split(".")
    tensor = rest[-1]
    number = re.sub(r"\D", "", part)
    one = ".conv1x1" if depth == 50 else ""
    if part == "stem":
        return f"block0.0.{tensor}"
    if part.startswith("block"):
        conv = rest[1]
        wrapped = one if int(number) >= 14 and conv in ("conv1", "conv3") else ""
        return f"res_block{number}.{conv}{wrapped}.{tensor}"
    if part.startswith("transition"):
        return f"trans_block{number}.conv{one if number == '3' else ''}.{tensor}"
    return {"final": "conv_block_f.conv", "head": "fc"}[part] + f".{tensor}"


def checkpoint(model, depth):
    tensors = {authors_name(k, depth): torch.randn_like(v) for k, v in model.state_dict().items()}
    assert len(tensors) == len(model.state_dict())
    return tensors


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_every_tensor_arrives_where_it_belongs(depth, tmp_path):
    model = knresnet(depth, width={50: 16}.get(depth, 8))
    published = checkpoint(model, depth)
    torch.save({"model": published, "epoch": 3}, tmp_path / "knresnet.pth")
    models.load_published_weights(model, tmp_path / "knresnet.pth")
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, published[authors_name(key, depth)])


def test_authors_keys_at_the_corners():
    names = {authors_name(k, 50) for k in knresnet(50, width=16).state_dict()}
    assert {
        "block0.0.weight",
        "res_block1.conv1.bias",
        "res_block13.conv3.weight",
        "res_block14.conv1.conv1x1.weight",
        "res_block14.conv2.weight",
        "res_block15.conv3.conv1x1.bias",
        "trans_block2.conv.weight",
        "trans_block3.conv.conv1x1.weight",
        "fc.weight",
    } <= names
    assert not any(n.startswith("conv_block_f") for n in names)


def test_what_does_not_fit_is_named_and_changes_nothing():
    model = knresnet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    good = checkpoint(model, 18)

    def refused(state, words):
        with pytest.raises(UserError, match=words):
            models.load_published_weights(model, state)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    refused({k: v for k, v in good.items() if k != "fc.bias"}, r"nothing for .*'head\.fc\.bias'")
    refused(good | {"res_block9.conv1.weight": torch.zeros(1)}, r"'res_block9\.conv1\.weight'")
    refused(good | {"extra": torch.zeros(1)}, "'extra' has no place")
    refused(good | {"fc.weight": torch.zeros(1000, 64)}, r"'fc\.weight' is \(1000, 64\).*\(7, 64\)")
    refused(good | {"fc.weight": 3}, r"'fc\.weight' is int")
    refused({"model": {}}, "nothing for")
    with pytest.raises(UserError, match="kernel normalizer"):
        models.load_published_weights(knresnet(normalizer="batch"), good)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was executed",))


def test_files_that_cannot_be_read_safely(tmp_path):
    model = knresnet()
    with pytest.raises(UserError, match="cannot read checkpoint"):
        models.load_published_weights(model, tmp_path / "missing.pth")
    torch.save({"model": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match="could run code"):
        models.load_published_weights(model, tmp_path / "trap.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Trap(), protocol=2))
    with pytest.raises(UserError, match="is refused"):
        models.load_published_weights(model, tmp_path / "raw.pth")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:500])
    with pytest.raises(UserError, match="damaged"):
        models.load_published_weights(model, tmp_path / "cut.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list"):
        models.load_published_weights(model, tmp_path / "list.pth")


@pytest.fixture(scope="module")
def published_files(tmp_path_factory):
    """One checkpoint in both of PyTorch's formats."""
    folder = tmp_path_factory.mktemp("published")
    tensors = {"model": checkpoint(knresnet(width=4), 18)}
    torch.save(tensors, folder / "zip.pth")
    torch.save(tensors, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    return {path.stem: path.read_bytes() for path in folder.iterdir()}


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(["zip", "legacy"]),
    # What describes the tensors stands at the beginning and at the end.
    flips=st.dictionaries(
        st.integers(-8000, 3000) | st.integers(-300, 300), st.integers(1, 255), max_size=4
    ),
    keep=st.floats(0, 4),
)
@pytest.mark.filterwarnings("ignore")
def test_whatever_is_damaged_is_one_line(kind, flips, keep, published_files, tmp_path):
    content = bytearray(published_files[kind])
    for place, bits in flips.items():
        content[place] ^= bits
    path = tmp_path / "damaged.pth"
    path.write_bytes(content[: int(keep * len(content))] if keep < 1 else content)
    said = ""
    try:
        models.load_published_weights(knresnet(width=4), path)
    except UserError as error:
        said = str(error)
    assert said.isprintable()


def test_a_flipped_bit_of_a_weight_is_noticed(published_files, tmp_path):
    content = bytearray(published_files["zip"])
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"the checksum of .* does not match"):
        models.load_published_weights(knresnet(width=4), tmp_path / "flipped.pth")


def test_tensors_that_cannot_be_weights_are_named():
    model = knresnet()
    published = checkpoint(model, 18)
    key = "res_block1.conv1.bias"
    for bad, said in (
        (torch.full_like(published[key], float("nan")), "not finite"),
        (published[key].to(torch.int8), "floating point"),
        (published[key].to_sparse(), "floating point"),
        (published[key].to("meta"), "floating point"),
    ):
        with pytest.raises(UserError, match=f"{re.escape(key)}.*{said}"):
            models.load_published_weights(model, published | {key: bad})
    twice = published | {"res_block1.conv1.conv1x1.bias": published[key]}
    with pytest.raises(UserError, match="under another name"):
        models.load_published_weights(model, twice)
    with pytest.raises(UserError, match="'5' has no place"):
        models.load_published_weights(model, published | {5: published[key]})
