import pytest

from fedkn.errors import UserError


@pytest.fixture(scope="session")
def torchvision():
    from fedkn.data.vision import import_torchvision

    try:
        return import_torchvision()
    except (ImportError, UserError):
        pytest.skip("torchvision is not installed")
