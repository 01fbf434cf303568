import importlib.util

import pytest
from host.harness import build, load_extension, start


@pytest.fixture(scope="session")
def extension():
    for module in ("pybind11", "ninja", "triton"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module} to compile the host logic for Python")
    return load_extension(build())


@pytest.fixture
def host(extension):
    """The extension with one H100, whose context is current."""
    start(extension, [90])
    return extension
