"""The code in the README runs as it stands."""

import pytest

from documents import code_blocks


@pytest.mark.parametrize("code", code_blocks("README.md"))
def test_readme_example(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(code, {})
    assert capsys.readouterr().out.count("relative error 0.") == 2
