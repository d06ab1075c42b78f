"""What results depend on is written beside them."""

import json

import torch

from utils import fingerprint


def test_a_source_tree_without_git_has_no_revision(monkeypatch, tmp_path):
    fingerprint.git_revision.cache_clear()
    revision = fingerprint.git_revision()
    assert revision is None or len(revision) >= 40
    monkeypatch.setenv("PATH", str(tmp_path))
    fingerprint.git_revision.cache_clear()
    assert fingerprint.git_revision() is None
    fingerprint.git_revision.cache_clear()


def test_it_is_plain_data_that_names_processor_and_versions():
    machine = fingerprint.fingerprint(torch.device("cpu"))
    assert json.loads(json.dumps(machine)) == machine
    assert machine["cpu"]
    assert machine["threads"] == torch.get_num_threads()
    assert machine["torch"] == str(torch.__version__)
    assert "gpu" not in machine
