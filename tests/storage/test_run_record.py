"""run.json and the provenance beside it, edited by hand: read, or refused in one line."""

import copy

import pytest

from stages.register.register import _default_name
from stages.report.report_data import SourceRecord
from stages.runtime.errors import InputError
from stages.storage.files import folder_sha256, read_json, write_json
from stages.storage.provenance import write_provenance, write_run_record
from stages.storage.run_record import read_provenance, read_run_record
from tests.fuzz.mutations import parent_of, places

OTHERS = (None, True, 10**30, 1.5, "x", [], [1], {}, {"a": 1})


def edited(tree):
    """Yield a copy of a tree for every place and every value of another type."""
    for place in places(tree)[1:]:
        for value in OTHERS:
            changed = copy.deepcopy(tree)
            parent_of(changed, place)[place[-1]] = value
            yield place, changed


def outcome(read):
    """Return what a function returns, or the message of its refusal."""
    try:
        return read(), ""
    except InputError as error:
        return None, error.message


def test_every_field_of_run_json_has_its_type(tmp_path, params):
    """Other types at the top are refused; what the params hold, their readers check."""
    write_run_record(tmp_path, "fetch", fetch=params.fetch)
    original = read_json(tmp_path / "run.json")
    assert read_run_record(tmp_path) == original
    for place, tree in edited(original):
        write_json(tmp_path / "run.json", tree)
        record, message = outcome(lambda: read_run_record(tmp_path))
        if record is None:
            assert "run.json is damaged" in message
            assert place[0] != "params" or len(place) == 1
        else:
            assert isinstance(record["stage"], str)
            assert isinstance(record["params"], dict)
            assert all(isinstance(version, str) for version in record["packages"].values())


def test_a_record_is_read_as_it_stands(tmp_path):
    """One from before versions were noted has none."""
    write_json(tmp_path / "run.json", {"stage": "fetch", "params": {}})

    assert read_run_record(tmp_path) == {"stage": "fetch", "params": {}}


def test_every_source_has_a_name_or_is_refused(params):
    """A version is named after its base model, whatever its run.json says of it."""
    source = params.fetch.model.model_dump(mode="json")
    for _, tree in edited({"params": {"fetch": {"model": source}}}):
        lineage = type("Lineage", (), {"runs": {"fetch": tree}})
        name, message = outcome(lambda lineage=lineage: _default_name(lineage))
        assert isinstance(name, str) or "give the version one with --name" in message
    for name in ("repo", "name", "path", "uri"):
        with pytest.raises(ValueError, match=name):
            SourceRecord.model_validate({"source": "folder", name: [1]})


def test_an_edited_provenance_is_unknown(tmp_path, params):
    """As one that belongs to another run.json."""
    out = tmp_path / "out"
    write_run_record(out, "prune", prune=params.prune)
    write_provenance(out)
    path = tmp_path / "out.provenance.json"
    original = read_json(path)
    assert read_provenance(out) == original
    for key, value in (
        ("device", 3),
        ("device", {"name": []}),
        ("git_commit", 1),
        ("code_sha256", []),
        ("git_dirty", "x"),
    ):
        write_json(path, {**original, "output_sha256": folder_sha256(out), key: value})
        assert read_provenance(out) is None
