"""What tools check of their command lines."""

import pytest

from utils.files import check_output


@pytest.mark.parametrize(
    ("name", "is_folder", "message"),
    [
        ("taken/out.json", False, r"--output .*taken is a file; give another place"),
        ("taken", True, r"taken is a file"),
        ("folder", False, r"--output .*folder is a folder: name a file"),
        ("new/out.json", False, None),
        ("folder", True, None),
    ],
)
def test_outputs_are_checked_before_there_is_something_to_lose(name, is_folder, message, tmp_path):
    (tmp_path / "taken").write_text("")
    (tmp_path / "folder").mkdir()
    if message is None:
        check_output(tmp_path / name, "--output", is_folder)
    else:
        with pytest.raises(ValueError, match=message):
            check_output(tmp_path / name, "--output", is_folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "taken"]


def test_a_folder_that_takes_no_file_is_told(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError("no")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # root may write anywhere
    with pytest.raises(ValueError, match=r"--json .*: nothing can be written to "):
        check_output(tmp_path / "a.json", "--json")
