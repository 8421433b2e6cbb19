"""The contract of every provider, as the tests of our backends use it."""

from __future__ import annotations

import pytest

from keymgmt.testing import ProviderContract


class PatientContract(ProviderContract):
    """A short time limit where the service is gone or hangs, and a long one where it works."""

    @pytest.fixture
    def time_limit(self, request: pytest.FixtureRequest) -> float:
        return 3.0 if {"hang_service", "break_service"} & set(request.fixturenames) else 20.0

    @pytest.fixture
    def wrap_key(self) -> str:
        return "model"
