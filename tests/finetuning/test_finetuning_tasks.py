"""Task folders: the project's own form and four original sets, each in awkward files; and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hyperrouter.errors import DataError
from megatron_hyperrouter.finetuning.tasks import Example, Task, read_task


def own_form(folder: Path, **changes: str | None) -> Path:
    """A good task folder, but for these files; None: left out."""
    files = {
        "labels.json": '["no", "yes"]',
        "train.jsonl": '{"text": "one", "label": 0}\n\n{"text": "tw\\u00f6", "label": "yes", "more": 1}\n',
        "dev.jsonl": '{"text": "three", "label": 1}',
        "test.jsonl": '{"text": "four\\nlines", "label": 0}\r\n',
    }
    files |= {name.replace("_", "."): text for name, text in changes.items()}
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        if text is not None:
            (folder / name).write_text(text, encoding="utf-8", newline="")
    return folder


def test_the_project_s_own_form(tmp_path: Path) -> None:
    task = read_task(own_form(tmp_path / "task"))
    assert task.labels == ("no", "yes") and task.notes == ()
    assert task.parts["train"] == (Example("one", 0), Example("twö", 1))
    assert task.parts["test"] == (Example("four\nlines", 0),)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"dev_jsonl": None}, "dev.jsonl is missing"),
        ({"labels_json": None}, "labels.json is missing"),
        ({"test_jsonl": ""}, "the test split has no texts"),
        ({"train_jsonl": '{"text": "a", "label": 2}'}, "line 1: 2 is not a label"),
        ({"train_jsonl": '{"text": "a", "label": 0}\n{"text": "b", "label": "maybe"}'}, 'line 2: "maybe"'),
        ({"train_jsonl": '{"text": "a", "label": true}'}, "true is not a label"),
        ({"train_jsonl": '{"text": "a", "label": -1}'}, "-1 is not a label"),
        ({"train_jsonl": '{"text": "a"}'}, "null is not a label"),
        ({"train_jsonl": '{"sentence": "a", "label": 0}'}, "line 1: there is no text"),
        ({"train_jsonl": '{"text": " ", "label": 0}'}, "line 1: there is no text"),
        ({"train_jsonl": '{"text": "a", "label": 0'}, "line 1: the line is not JSON"),
        ({"labels_json": '{"a": 0}'}, "must be a list of names"),
        ({"labels_json": '["a", "a"]'}, "names a label twice"),
    ],
)
def test_a_wrong_folder_is_refused(tmp_path: Path, changes: dict[str, str | None], words: str) -> None:
    with pytest.raises(DataError, match="remedy") as refused:
        read_task(own_form(tmp_path / "task", **changes))
    assert words in str(refused.value)


def test_a_folder_that_is_not_there_and_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        read_task(tmp_path / "missing")
    folder = own_form(tmp_path / "task")
    (folder / "dev.jsonl").write_bytes(b'{"text": "\xff", "label": 0}')
    with pytest.raises(DataError, match=r"dev.jsonl, line 1: the line is not JSON in UTF-8"):
        read_task(folder)


def test_duplicates_and_labels_without_texts_are_reported(tmp_path: Path) -> None:
    same = '{"text": "One!", "label": 0}\n{"text": "new", "label": 1}'
    task = read_task(own_form(tmp_path / "task", test_jsonl=same, labels_json='["no", "yes", "never"]'))
    assert task.notes == (
        "1 text of test are also in train, so scores on test may be too high",
        "no text in train has the label never",
    )


def texts(task: Task, part: str) -> list[tuple[str, str]]:
    return [(text, task.labels[label]) for text, label in task.parts[part]]


def test_sst2(tmp_path: Path) -> None:
    rows = [f'sentence {n} "quoted" \t{n % 2}' for n in range(40)]
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nit 's \"a , open quote \t1\nnone\t0\n")
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\tno label here\n")
    task = read_task(tmp_path)
    assert texts(task, "test") == [("it 's \"a , open quote", "positive"), ("none", "negative")]
    held = set(task.parts["train"]) | set(task.parts["dev"])
    assert len(task.parts["train"]) + len(task.parts["dev"]) == len(held) == 40
    assert ('sentence 3 "quoted"', 1) in held and 0 < len(task.parts["dev"]) < 12
    assert "dev.tsv is used as test" in task.notes[0]


def test_sst2_with_a_label_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("sentence\tlabel\na\t0\nb\t-1\n")
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\na\t0\n")
    with pytest.raises(DataError, match="has the unknown label '-1'"):
        read_task(tmp_path)


def test_sst5(tmp_path: Path) -> None:
    (tmp_path / "trees").mkdir()
    tree = "(3 (2 The) (4 (3 (2 -LRB-) (2 big)) (2 -RRB-)))"
    for part in ("train", "dev", "test"):
        (tmp_path / "trees" / f"{part}.txt").write_text(f"{tree}\n\n(0 (1 1\\/2) (2 stars))\n")
    task = read_task(tmp_path)
    assert texts(task, "dev") == [("The ( big )", "positive"), ("1/2 stars", "very negative")]
    (tmp_path / "trees" / "dev.txt").write_text(f"{tree}\nno tree\n")
    with pytest.raises(DataError, match=r"dev.txt, line 2: the line must be a tree"):
        read_task(tmp_path)


def test_imdb(tmp_path: Path) -> None:
    for half in ("train", "test"):
        for label in ("pos", "neg"):
            folder = tmp_path / "aclImdb" / half / label
            folder.mkdir(parents=True)
            urls = []
            for number in range(30):
                urls.append(f"http://www.imdb.com/title/tt{number // 2:07}/usercomments")
                (folder / f"{number}_7.txt").write_text(f"{label} {number}<br /><br />next")
            (folder.parent / f"urls_{label}.txt").write_text("\n".join(urls))
    task = read_task(tmp_path)
    assert task.labels == ("neg", "pos") and len(task.parts["test"]) == 60
    assert ("pos 3\nnext", 1) in task.parts["test"]
    film = {part: {int(t.split()[1]) // 2 for t, _ in task.parts[part]} for part in ("train", "dev")}
    assert film["dev"] and not film["dev"] & film["train"]  # reviews of one film are on one side


def test_imdb_as_one_table(tmp_path: Path) -> None:
    rows = "".join(
        f'"He said ""{n}"", twice,\nthen<br/>left",{("negative", "positive")[n % 2]}\n' for n in range(60)
    )
    (tmp_path / "IMDB Dataset.csv").write_text("review,sentiment\n" + rows)
    task = read_task(tmp_path)
    assert sum(map(len, task.parts.values())) == 60
    assert ('He said "8", twice,\nthen\nleft', "negative") in texts(task, "train")


def test_banking77(tmp_path: Path) -> None:
    rows = "".join(f'"question {n},\nsecond line",topic_{n % 3}\n' for n in range(60))
    (tmp_path / "train.csv").write_text("\ufefftext,category\n" + rows, encoding="utf-8")
    (tmp_path / "test.csv").write_text("text,category\nplain,topic_1\n")
    task = read_task(tmp_path)
    assert task.labels == ("topic_0", "topic_1", "topic_2")
    assert texts(task, "test") == [("plain", "topic_1")]
    assert len(task.parts["train"]) + len(task.parts["dev"]) == 60
    (tmp_path / "test.csv").write_text("text,category\nplain,topic_9\n")
    with pytest.raises(DataError, match="has the unknown label 'topic_9'"):
        read_task(tmp_path)
    (tmp_path / "test.csv").write_text("text,label\nplain,topic_1\n")
    with pytest.raises(DataError, match="has no column 'category'"):
        read_task(tmp_path)


def test_the_hash_of_a_text_alone_decides_where_it_goes(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, order in zip(folders, (1, -1), strict=True):
        folder.mkdir()
        rows = [json.dumps(f"text {n}") + f",topic_{n % 2}\n" for n in range(50)][::order]
        (folder / "train.csv").write_text("text,category\n" + "".join(rows))
        (folder / "test.csv").write_text("text,category\nplain,topic_1\n")
    first, second = (set(read_task(folder).parts["dev"]) for folder in folders)
    assert first == second


def test_the_stand_in_from_wordnet(tmp_path: Path) -> None:
    """``examples/tasks/make_tasks.py`` on a few lines of WordNet's form."""
    place = tmp_path / "packages/wordnet-base/usr/share/wordnet"
    place.mkdir(parents=True)
    lines = ["  1 This software and database is being provided"]
    lines += [f'{n:08} {n % 3:02} n 01 thing 0 000 | gloss {n}; "an example"; "more"  ' for n in range(60)]
    for kind in ("noun", "verb", "adj", "adv"):
        (place / f"data.{kind}").write_text("\n".join(lines), encoding="latin-1")
    script = Path(__file__).resolve().parents[2] / "examples/tasks/make_tasks.py"
    words = [sys.executable, str(script), str(tmp_path / "packages"), str(tmp_path / "tasks"), "senses45"]
    subprocess.run(words, check=True, capture_output=True)
    task = read_task(tmp_path / "tasks/senses45")
    assert task.labels == ("00", "01", "02") and task.notes == ()
    found = {example for part in task.parts.values() for example in part}
    assert found == {Example(f"gloss {n}", n % 3) for n in range(60)}  # once each
