"""The record that users' rewards are called with."""

import dataclasses

import pytest
from rewards.records import record


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        record("a").response = "b"
