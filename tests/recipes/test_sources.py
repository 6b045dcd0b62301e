import json

import pytest

from galore_trainer.errors import OptionError
from galore_trainer.recipes.sources import kind_of, read_file, rename_columns

ROWS = [{"question": "1 + 1?", "answer": "#### 2"}, {"question": 'a\nb, "c"\u2028d', "answer": "#### 3"}]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def refused(source):
    with pytest.raises(OptionError) as error:
        read_file("data.source", source)
    assert error.value.option == "data.source"
    assert error.value.got == source
    return str(error.value)


@pytest.fixture
def files(tmp_path):
    import pyarrow
    import pyarrow.parquet

    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    quoted = [f'"{row["question"]}"'.replace('"c"', '""c""') + f",{row['answer']}" for row in ROWS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    return {
        "jsonl": write(tmp_path / "l.jsonl", "\ufeff" + lines[0] + "\n\n" + lines[1] + "\n"),
        "lines in .json": write(tmp_path / "l.json", "\n".join(lines)),
        "array": write(tmp_path / "a.json", json.dumps(ROWS, indent=1)),
        "csv": write(tmp_path / "c.csv", "question,answer\n" + "\n\n".join(quoted) + "\n"),
        "parquet": str(tmp_path / "p.parquet"),
    }


@pytest.mark.parametrize(
    ("form", "places", "ids"),
    [
        ("jsonl", ["line 1", "line 3"], ["l.jsonl:1", "l.jsonl:3"]),
        ("lines in .json", ["line 1", "line 2"], ["l.json:1", "l.json:2"]),
        ("array", ["line 2", "line 6"], ["a.json:2", "a.json:6"]),
        ("csv", ["line 2", "line 4"], ["c.csv:2", "c.csv:4"]),
        ("parquet", ["row 1", "row 2"], ["p.parquet:1", "p.parquet:2"]),
    ],
)
def test_every_form_gives_the_same_rows_with_their_places(files, form, places, ids):
    rows = read_file("data.source", files[form])
    assert [dict(row.fields) for row in rows] == ROWS
    assert [row.place for row in rows] == places
    assert [row.id for row in rows] == ids


def test_missing_file_names_the_path_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"There is no {tmp_path / 'data.jsonl'}" in refused("data.jsonl")


@pytest.mark.parametrize("name", ["e.json", "e.jsonl", "e.csv", "e.parquet"])
def test_empty_file(tmp_path, name):
    assert "at least one row" in refused(write(tmp_path / name, ""))


def test_file_with_a_header_or_brackets_alone_is_empty(tmp_path):
    assert "at least one row" in refused(write(tmp_path / "e.csv", "question,answer\n"))
    assert "at least one row" in refused(write(tmp_path / "e.json", "[]"))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("m.jsonl", '{"a": 1}\n{"a": 2\n', "line 2 is not (column 8"),
        ("m.json", '[\n {"a": 1},\n {"a" 2}\n]', "line 3 is not (column 7"),
        ("m.json", '[{"a": 1}', "line 1 is not"),
        ("m.jsonl", '{"a": 1}\n[1, 2]\n', "named fields in line 2, not [1, 2]"),
        ("m.csv", "a,b\n1,2\n3\n", "line 3 is not (1 cells under 2 names)"),
        ("m.csv", 'a,b\n1,2\n"x"y,2\n', "line 3 is not"),
        ("m.csv", 'a,b\n1,"2\n', "line 2 is not"),
        ("m.csv", "a,a\n1,2\n", "different names in line 1"),
        ("m.parquet", "no parquet", "a Parquet file"),
    ],
)
def test_malformed_file_names_the_line(tmp_path, name, text, said):
    message = refused(write(tmp_path / name, text))
    assert said in message
    assert name in message


def test_text_that_is_not_utf8(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"a": "é"}'.encode("latin-1"))
    assert "UTF-8" in refused(str(path))


def test_directory_and_unknown_suffix(tmp_path):
    assert ".parquet" in refused(str(tmp_path))
    assert ".parquet" in refused(write(tmp_path / "data.txt", "x"))


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("embedded:arithmetic", "embedded"),
        ("reasoning_gym:gsm_symbolic", "reasoning_gym"),
        ("openai/gsm8k", "hub"),
        ("not/there.jsonl", "file"),
        ("../data/rows.csv", "file"),
    ],
)
def test_kind_of_a_source(source, kind):
    assert kind_of("data.source", source) == kind


@pytest.mark.parametrize("source", ["embedded:chess", "gsm8k", "a/b/c", "", "https://example.org/data"])
def test_source_that_is_nothing_known(source):
    with pytest.raises(OptionError, match="hub id owner/name"):
        kind_of("data.source", source)


def test_row_names_file_line_and_field(files):
    row = read_file("data.source", files["jsonl"])[1]
    with pytest.raises(OptionError, match=r"l\.jsonl.*a text in field 'solution' of line 3.*question, answer"):
        row.text("solution")


def test_columns_are_renamed_and_a_missing_one_is_an_error(files):
    rows = read_file("data.source", files["csv"])
    renamed = rename_columns(rows, {"prompt": "question", "question": "answer"})
    assert dict(renamed[0].fields) == {"prompt": "1 + 1?", "question": "#### 2"}
    with pytest.raises(OptionError, match=r"data\.columns: got 'Query'.*question, answer"):
        rename_columns(rows, {"question": "Query"})
