import os
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from resformer.data import corpus
from resformer.data.corpus import read_corpus


@pytest.fixture
def folder(tmp_path):
    """Six documents in files of each kind, one of them below."""
    (tmp_path / "b.txt").write_bytes("\ufefffirst\r\nblock\r\n \t\r\n\n\nsecond é\n".encode())
    (tmp_path / "a.jsonl").write_text('{"text": "third \\n\\n one"}\n\n{"text": " "}\n{"text": "x\u2028y", "n": 1}\n')
    (tmp_path / "notes.md").write_text("not of the corpus")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.json").write_text('{"text": "fifth"}\n')
    pq.write_table(pa.table({"text": ["sixth", ""]}), tmp_path / "d.parquet")
    return tmp_path


ALL = ["third \n\n one", "x\u2028y", "first\nblock", "second é", "sixth", "fifth"]


@pytest.mark.parametrize(
    "sources", [["."], ["./a*", "b.txt", "*.parquet", "deep"], ["[ab].*", "d.*", "deep/**/*.json"]]
)
def test_documents_in_a_fixed_order(folder, monkeypatch, sources):
    monkeypatch.chdir(folder)
    texts = read_corpus(sources)
    assert list(texts) == ALL
    assert list(texts) == ALL, "also the second time"


def test_a_source_may_be_named_like_a_pattern(tmp_path):
    (tmp_path / "x[1].txt").write_text("one")
    (tmp_path / "x1.txt").write_text("other")
    assert list(read_corpus([str(tmp_path / "x[1].txt")])) == ["one"]


def test_parquet_is_read_in_batches_and_of_every_text_type(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "ROWS", 7)
    texts = [f"text {i}" for i in range(40)]
    for type_ in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"n": range(40), "body": pa.array(texts).cast(type_)}), tmp_path / "t.parquet")
        assert list(read_corpus([tmp_path / "t.parquet"], column="body")) == texts


def test_a_long_block_is_cut_at_the_end_of_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK", 10)
    (tmp_path / "t.txt").write_text("123456\n123456\n1234567\n\n12345678901234\nx\n")
    assert list(read_corpus([tmp_path])) == ["123456\n123456", "1234567", "12345678901234", "x"]


def test_fingerprint_is_of_content_and_column(folder, tmp_path_factory):
    whole = read_corpus([folder]).fingerprint
    elsewhere = tmp_path_factory.mktemp("moved")
    for path in ("b.txt", "a.jsonl", "d.parquet"):
        (elsewhere / path.replace("b.", "bb.")).write_bytes((folder / path).read_bytes())
    (elsewhere / "deep").mkdir()
    (elsewhere / "deep" / "c.json").write_text('{"text": "fifth"}\n')
    assert read_corpus([elsewhere]).fingerprint == whole
    (elsewhere / "bb.txt").write_text("first block")
    assert read_corpus([elsewhere]).fingerprint != whole
    assert read_corpus([folder / "b.txt"], column="other").fingerprint != read_corpus([folder / "b.txt"]).fingerprint
    assert (
        read_corpus([folder / "b.txt", folder / "a.jsonl"]).fingerprint
        != read_corpus([folder / "a.jsonl", folder / "b.txt"]).fingerprint
    )


# --- wrong input --------------------------------------------------------------------------------------


def refused(sources, **options):
    with pytest.raises(ValueError) as error:  # noqa: PT011 the callers look at the message
        read_corpus(sources, **options)
    return str(error.value)


def test_sources_that_match_nothing(folder):
    assert refused([]).startswith("no corpus given")
    message = refused([folder / "b.txt", f"{folder}/deep/*.txt"])
    assert "deep/*.txt' matches nothing" in message
    assert message.endswith("deep holds c.json")
    assert "holds a.jsonl, b.txt, d.parquet, deep/, notes.md" in refused([folder / "no" / "such" / "x.txt"])
    (folder / "none").mkdir()
    (folder / "none" / ".hidden.txt").write_text("x")
    assert "has no file ending in .txt, .jsonl, .json, .parquet" in refused([folder / "none"])
    assert "notes.md is none of the kinds .txt, .jsonl" in refused([folder / "*"])
    assert "b.txt more than once; give each source once" in refused([folder / "b.txt", folder / "*.txt"])


def test_missing_column_is_said_before_reading(folder):
    assert "d.parquet has no column 'body' for the text; it has text" in refused([folder / "d.parquet"], column="body")
    assert "a.jsonl, line 1 has no column 'body' for the text; it has text" in refused([folder], column="body")
    pq.write_table(pa.table({"label": [1]}), folder / "last.parquet")
    assert "last.parquet has no column 'text'" in refused([folder / "b.txt", folder / "last.parquet"])


def test_empty_corpus(tmp_path):
    (tmp_path / "a.txt").write_text(" \n\n\t\n")
    (tmp_path / "b.jsonl").write_text("")
    assert "the corpus is empty: no document in" in refused([tmp_path])


def test_bad_text_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n\nalso f\xe4n\n")
    with pytest.raises(ValueError, match=r"a.txt is not UTF-8: byte 12 \(line 3\) is 0xe4; convert the file"):
        list(read_corpus([path]))
    path.write_bytes(b"\xff\xfea\x00")
    assert "byte 0 (line 1) is 0xff" in refused([path])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', "a.jsonl, line 3 is not JSON"),
        ("[1]", "a.jsonl, line 3 is a list"),
        ('{"text": null}', "a.jsonl, line 3: 'text' is 'None' of type NoneType, not a text"),
        ('{"text": 3}', "a.jsonl, line 3: 'text' is '3' of type int, not a text"),
        ('{"text": "\\ud83d"}', "a.jsonl, line 3: 'text' is no text: 'utf-8' codec can't encode"),
        ('{"txt": "x"}', "a.jsonl, line 3 has no column 'text' for the text; it has txt"),
    ],
)
def test_malformed_rows_are_named_by_file_and_line(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match="line 3") as error:
        list(read_corpus([tmp_path]))
    assert message in str(error.value)
    (tmp_path / "a.jsonl").write_text(line)
    assert message.replace("line 3", "line 1") in refused([tmp_path])


def test_parquet_that_is_none(tmp_path):
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet, row 2: 'text' is 'None' of type NoneType"):
        list(read_corpus([tmp_path]))
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    assert "cannot read" in refused([tmp_path])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    assert "cannot read" in refused([tmp_path])


# --- the hub ------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A hub of one data set; the lists say what was asked of it, and its commits."""
    asked, commits = [], ["c0ffee"]

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        if name != "some/wiki":
            raise FileNotFoundError(f"data set {name} not found")
        return iter([{"text": "one", "id": 1}, {"text": "", "id": 2}, {"text": "two", "id": 3}])

    class Api:
        def dataset_info(self, name):
            return SimpleNamespace(sha=commits[-1])

    monkeypatch.setattr(corpus, "load_dataset", load_dataset)
    monkeypatch.setattr(corpus, "HfApi", Api)
    for name in corpus.OFFLINE:
        monkeypatch.delenv(name, raising=False)
    return SimpleNamespace(asked=asked, commits=commits)


@pytest.mark.parametrize(
    ("source", "config", "split"),
    [
        ("hub:some/wiki", None, "train"),
        ("hub:some/wiki:2023.en", "2023.en", "train"),
        ("hub:some/wiki:2023.en:test", "2023.en", "test"),
        ("hub:some/wiki::test", None, "test"),
    ],
)
def test_hub_data_sets_are_streamed(hub, source, config, split):
    texts = read_corpus([source])
    assert list(texts) == ["one", "two"]
    assert set(hub.asked) == {("some/wiki", config, split, True)}
    assert texts.fingerprint == read_corpus([source]).fingerprint
    assert texts.fingerprint != read_corpus(["hub:some/wiki::other"]).fingerprint
    hub.commits.append("decaf")
    assert texts.fingerprint != read_corpus([source]).fingerprint, "the data set was changed"


def test_hub_sources_that_cannot_be(hub, monkeypatch):
    assert "'hub:a/b/c' is no data set of the hub; it is written hub:OWNER/NAME" in refused(["hub:a/b/c"])
    assert "cannot read hub:some/other::train: data set some/other not found" in refused(["hub:some/other"])
    assert "hub:some/wiki::train, row 1 has no column 'body' for the text; it has text, id" in refused(
        ["hub:some/wiki"], column="body"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.asked.clear()
    assert "'hub:some/wiki' is on the hub, and HF_HUB_OFFLINE forbids it; give local files" in refused(
        ["hub:some/wiki"]
    )
    assert not hub.asked
