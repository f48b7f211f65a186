"""A device's own images, as the ClientApp's session takes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import RecordDict

from clients.device.data import label_counts, load_own, node_data
from clients.session import open_session
from fedkn.data import sources
from fedkn.data.split import stratified_split
from fedkn.data.summary import DataSummary
from fedkn.errors import UserError
from fedkn.experiment import build_model, data_summary, federated_data, inputs_of
from fedkn.federation import join_request
from server.rounds.membership import ClientsMissing
from server.run import run_server
from tests.clients.device.conftest import device_context
from tests.server.fake_grid import FakeGrid, small

DIGITS = sources.load("digits").train


def save(path, images=DIGITS.inputs[:200], labels=DIGITS.targets[:200], **arrays):
    np.savez(path, images=np.asarray(images), labels=np.asarray(labels), **arrays)
    return str(path)


def by_content(images, labels):
    """Return images with their labels in an order of their own, to compare as sets."""
    return sorted(
        (image.numpy().tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )


def test_the_device_trains_on_all_of_its_own_images(digits_file):
    session, partition = open_session(device_context(small(), data_path=str(digits_file)), None)
    assert partition == 1
    assert by_content(*session.client_data(1)) == by_content(
        DIGITS.inputs[:200], DIGITS.targets[:200]
    )
    assert [len(part) for part in session.parts][:3] == [0, 200, 0]
    assert not len(session.held_data(1)[0])


def test_without_a_data_path_it_holds_its_partition():
    config = small()
    session, _ = open_session(device_context(config, device_name="a"), None)
    assert torch.equal(session.client_data(1)[0], federated_data(config).client(1).inputs)


def test_images_set_apart_for_tests_are_not_trained_on(tmp_path):
    path = save(
        tmp_path / "a.npz",
        test_images=DIGITS.inputs[200:300].numpy(),
        test_labels=DIGITS.targets[200:300].numpy(),
    )
    session, _ = open_session(device_context(small(), data_path=path), None)
    assert by_content(*session.client_data(1)) == by_content(
        DIGITS.inputs[:200], DIGITS.targets[:200]
    )


def test_a_part_is_kept_to_evaluate_on_as_in_a_simulation(digits_file):
    config = small(evaluation__client_fraction=0.3, evaluation__split="test")
    session, _ = open_session(device_context(config, data_path=str(digits_file)), None)
    used, kept = stratified_split(session.targets, 0.3, config.seed, "client-1")
    rest, _ = stratified_split(session.targets[kept], 1 / 3, config.seed, "choice-1")
    assert np.array_equal(session.parts[1], used)
    assert np.array_equal(session.held[1], kept[rest])


def test_folders_of_images_are_resized_to_the_experiments(tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    for label in range(10):
        (tmp_path / str(label)).mkdir()
        for number in range(3):
            image = np.full((20, 20), 20 * label + number, dtype=np.uint8)
            pillow.fromarray(image).save(tmp_path / str(label) / f"{number}.png")
    session, _ = open_session(device_context(small(), data_path=str(tmp_path)), None)
    images, labels = session.client_data(1)
    assert images.shape == (30, *DIGITS.inputs.shape[1:])
    assert all(
        int(image[0, 0, 0]) // 20 == label for image, label in zip(images, labels, strict=True)
    )


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        (
            {"classes": np.array([*"012345678x"])},
            "lacks: x. The experiment's are 0, 1, .*; those here",
        ),
        ({"images": DIGITS.inputs[:200].repeat(1, 3, 1, 1)}, "3 channel"),
        ({"images": DIGITS.inputs[:200, :, :6, :6]}, "6x6 pixels, but the experiment of 8x8"),
    ],
)
def test_what_differs_from_the_experiment_is_named(tmp_path, arrays, named):
    path = save(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=named):
        open_session(device_context(small(), data_path=path), None)


@pytest.mark.parametrize("scaling", ["standardized", "unit"])
def test_what_the_server_tells_stands_in_for_the_experiments_source(tmp_path, scaling):
    """Its model and its scaling, to the bit; and the device's own classes in its order."""
    here = small(data__scaling=scaling)
    elsewhere = here.overlay(data__source="arrays", data__root="/only/on/the/server.npz")
    names = [*"1023456789"]
    swapped = torch.tensor([names.index(str(int(label))) for label in DIGITS.targets[:200]])
    path = save(tmp_path / "a.npz", labels=swapped, classes=np.array(names))
    told = join_request(data_summary(here))
    session, _ = open_session(device_context(elsewhere, data_path=path), told)
    assert session.compared
    wanted, got = build_model(here).state_dict(), session.workspace.state()
    assert all(torch.equal(got[name], value) for name, value in wanted.items())
    images, labels = session.client_data(1)
    assert by_content(images, labels) == by_content(DIGITS.inputs[:200], DIGITS.targets[:200])
    assert torch.equal(session.inputs(images), inputs_of(here, images.device)(images))


def test_a_device_may_lack_classes_and_have_them_in_another_order(tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    for name in ("7", "12", "3"):
        (tmp_path / name).mkdir()
        pillow.fromarray(np.full((8, 8), int(name), dtype=np.uint8)).save(tmp_path / name / "a.png")
    told = join_request(DataSummary(("3", "5", "7", "12"), (1, 8, 8)))
    elsewhere = small(data__source="image_folder", data__root="/none", data__scaling="unit")
    session, _ = open_session(device_context(elsewhere, data_path=str(tmp_path)), told)
    images, labels = session.client_data(1)
    assert {(int(i[0, 0, 0]), int(n)) for i, n in zip(images, labels, strict=True)} == {
        (3, 0),
        (7, 2),
        (12, 3),
    }
    assert session.workspace.model(session.inputs(images)).shape == (3, 4)


def test_what_the_server_tells_counts_more_than_a_source_of_the_device(tmp_path):
    path = save(tmp_path / "a.npz")
    told = join_request(DataSummary((*"0123456789", "a", "b"), (1, 8, 8)))
    session, _ = open_session(device_context(small(data__scaling="unit"), data_path=path), told)
    assert session.workspace.model(session.inputs(session.examples[:2])).shape == (2, 12)


def test_a_message_that_tells_nothing_is_refused(tmp_path):
    context = device_context(small(), data_path=save(tmp_path / "a.npz"))
    with pytest.raises(UserError, match="does not say what the experiment's images are like"):
        open_session(context, RecordDict())


def test_before_any_message_the_own_images_stand_in(tmp_path):
    path = save(tmp_path / "a.npz")
    elsewhere = small(data__source="arrays", data__root="/only/on/the/server.npz")
    session, _ = open_session(device_context(elsewhere, data_path=path), None)
    assert not session.compared
    scaled = session.inputs(session.client_data(1)[0])
    assert scaled.mean().item() == pytest.approx(0, abs=1e-4)
    assert open_session(device_context(small(), data_path=path), None)[0].compared


class Devices(FakeGrid):
    """Devices with images of their own: for each partition the .npz."""

    def __init__(self, config, paths):
        super().__init__(config)
        for context, path in zip(self._contexts.values(), paths, strict=True):
            context.node_config["data-path"] = path


def test_a_run_of_devices_with_their_own_images(tmp_path):
    """The server's images are nobody's; the devices name and order their classes differently."""
    names = [f"digit {n}" for n in range(10)]
    test = {"test_images": DIGITS.inputs[:60].numpy(), "test_labels": DIGITS.targets[:60].numpy()}
    source = save(tmp_path / "server.npz", classes=np.array(names), **test)
    paths = []
    for number, order in enumerate((names, names[::-1], names[3:])):
        part = slice(200 * number + 200, 200 * number + 400)
        has = torch.tensor([f"digit {int(n)}" in order for n in DIGITS.targets[part]])
        images, labels = DIGITS.inputs[part][has], DIGITS.targets[part][has]
        own = [order.index(f"digit {int(n)}") for n in labels]
        paths.append(save(tmp_path / f"{number}.npz", images, own, classes=np.array(order)))
    config = small(
        data__source="arrays",
        data__root=source,
        data__test_limit=0,
        partition__clients=3,
        train__batch_size=4,
        train__local_steps=0,
    )
    assert run_server(Devices(config, paths), config).evaluation.value > 0.5
    strange = save(tmp_path / "strange.npz")
    with pytest.raises(ClientsMissing, match=r"partitions 2\.") as caught:
        run_server(Devices(config, [*paths[:2], strange]), config)
    assert "The experiment's are digit 0, " in str(caught.value)
    assert "those here are 0, 1, 2" in str(caught.value)


def test_counts_of_every_label(digits_file):
    own = node_data({"data-path": str(digits_file)})
    counts = label_counts(load_own(own, small().data, data_summary(small())))
    assert counts == {str(d): int((DIGITS.targets[:200] == d).sum()) for d in range(10)}
    ninth = DataSummary((*"0123456789", "none of these"), (1, 8, 8))
    assert label_counts(load_own(own, small().data, ninth))["none of these"] == 0


def test_bad_entries_of_the_nodes_config():
    with pytest.raises(UserError, match="did you mean 'arrays'"):
        node_data({"data-path": "x", "data-kind": "array"})
    with pytest.raises(UserError, match="no data-path"):
        node_data({"data-kind": "arrays"})
    with pytest.raises(UserError, match=r"this device's data: no \.npz file at"):
        open_session(device_context(small(), data_path="/nowhere/a.npz"), None)
