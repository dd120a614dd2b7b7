"""The tests' own tools: a reader that hangs is not taken for one that answers with an error."""

import time

import pytest

from tests.fuzz import inputs


def test_a_hang_is_no_error_of_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "PATIENCE", 1)

    def read() -> None:
        try:
            time.sleep(30)
        except Exception as error:  # as a reader does with the errors of a library
            raise ValueError("cannot be read") from error

    with pytest.raises(inputs.Hang, match="no answer after 1 s"):
        inputs.outcome(read)
