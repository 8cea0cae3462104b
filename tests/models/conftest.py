from __future__ import annotations

import pytest

from . import tiny


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """folders("sdxl", prediction=...) -> a pipeline folder, made once a session. Read-only by agreement."""
    made = {}

    def folder(family: str, **options):
        key = (family, *sorted(options.items()))
        if key not in made:
            made[key] = tiny.make(family, tmp_path_factory.mktemp(family), **options)
        return made[key]

    return folder
