"""One server for all tests that do not change it."""

from __future__ import annotations

import pytest
from server_material import make_backbone, make_library, serving


@pytest.fixture(scope="session")
def backbone():
    return make_backbone()


@pytest.fixture(scope="session")
def library(backbone, tmp_path_factory):
    return make_library(backbone, tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="session")
def server(backbone, library):
    with serving(backbone, library) as running:
        yield running
