"""A model that is loaded from the server where it lies."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from keymgmt_openvino import load
from programs import run

pytest.importorskip("urllib3")


def test_it_says_what_the_model_in_a_folder_says(magika_sealed, site):
    from webserver import files_of, serving

    with serving(files_of(magika_sealed.parent)) as web:
        where = f"{web.url}/{magika_sealed.name}"
        given = np.zeros((1, 2048), np.int32)
        with load(magika_sealed, keys=site.path) as model:
            expected = model({"bytes": given})["target_label"].copy()
        with load(where, keys=site.path) as model:
            assert (model({"bytes": given})["target_label"] == expected).all()
        command = [sys.executable, "-m", "keymgmt.cli", "--config", site.path, "run", where]
        done = run(*command)
        assert done.returncode == 0, done.stderr
