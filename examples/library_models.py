"""Compare normalizers in networks of torchvision and timm, on a folder of images.

Both libraries write their networks with BatchNorm; fedkn converts them for each normalizer. The
files lie in ``ROOT/CLASS/DESK-NUMBER.png``: whose each image is stands in its name.
"""

# ruff: noqa: PLC0415 - whoever wants one of the two networks needs its library alone

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image
from torch import nn

import fedkn
from fedkn.data.sources import load


def mobilenet(num_classes: int, width: float = 0.25) -> nn.Module:
    """Return torchvision's MobileNetV3-Small, a quarter as wide, without dropout."""
    from torchvision.models import mobilenet_v3_small

    return mobilenet_v3_small(num_classes=num_classes, width_mult=width, dropout=0.0)


def timm_model(num_classes: int, in_channels: int, name: str = "test_resnet") -> nn.Module:
    """Return the network that timm calls `name`, with weights drawn anew."""
    import timm

    return timm.create_model(name, num_classes=num_classes, in_chans=in_channels)


def photos(root: Path, side: int = 32) -> dict[str, object]:
    """Return images (N, 3, side, side), what they show, and whose they are."""
    classes = sorted(path.name for path in Path(root).iterdir() if path.is_dir())
    files = sorted(Path(root).glob("*/*.png"))
    images = [Image.open(path).convert("RGB").resize((side, side)) for path in files]
    return {
        "inputs": np.stack([np.asarray(image).transpose(2, 0, 1) for image in images]),
        "targets": [classes.index(path.parent.name) for path in files],
        "clients": [path.name.partition("-")[0] for path in files],
        "classes": classes,
    }


def write_digits(root: Path, count: int = 240) -> None:
    """Write some of the embedded digits as such a folder, of three desks."""
    digits = load("digits").train
    for i in range(count):
        folder = Path(root) / str(int(digits.targets[i]))
        folder.mkdir(exist_ok=True)
        image = digits.inputs[i].squeeze().numpy()
        Image.fromarray(image).save(folder / f"desk{i % 3}-{i:03}.png")


if __name__ == "__main__":
    with TemporaryDirectory() as root:
        write_digits(Path(root))
        result = fedkn.compare(
            source="library_models:photos",
            root=root,
            partition="natural",
            model="library_models:mobilenet",
            normalizer=["kernel", "group"],
            batch_size=2,
            seeds=1,
            learning_rate=0.05,
            clients=3,
            cohort=3,
            rounds=2,
            train={"local_steps": 4},
        )
    print(result.cells[["cell", "parameters", "value"]].to_string(index=False))
