"""``diffalign arena`` on the command line."""

import pytest

from diffalign.cli import main


@pytest.mark.parametrize("given, words", [
    (["/nowhere"], "no such file or folder"), (["gallery", "kk=3"], 'Did you mean "k"'), (["gallery", "k=10"], "k: must be"),
    (["gallery", "host=0.0.0.0"], "token_env"), (["gallery", "export=out"], "no such file or folder")])
def test_wrong_options_are_one_line(tmp_path, monkeypatch, capsys, given, words):
    monkeypatch.chdir(tmp_path)
    assert main(["arena", *given]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1 and "Traceback" not in error
