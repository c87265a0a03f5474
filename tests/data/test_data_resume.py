"""A command that is killed at any step and started again writes the same bytes as one that was not."""

from __future__ import annotations

import inspect
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from encode_settings import settings

from megatron_hyperrouter.data.text import corpus
from megatron_hyperrouter.data.tokenize import bpe
from megatron_hyperrouter.data.tokenize.preprocess import EncodeSettings, preprocess
from megatron_hyperrouter.errors import ConfigError, DataError

NAMES = ("replace", "unlink")  # the steps that give files their names, and take old ones away
STEPS = ("fsync", *NAMES)
KILLED = 77


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], EncodeSettings]:
    monkeypatch.setattr(corpus, "BATCH_BYTES", 700)
    monkeypatch.setattr(corpus, "PIECE_BYTES", 500)
    source = inspect.getsource(json.decoder)
    records = [
        {"text": [source[n * 90 : n * 90 + 200], f"żółw {n}"] if n % 4 else "", "note": source[: n * 9]}
        for n in range(25)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "b.txt").write_text(source[:3000])
    bpe.train_bpe(iter([source]), 400, str(tmp_path / "tokenizer.json"))
    recipe = settings(
        "HuggingFaceTokenizer", str(tmp_path / "tokenizer.json"), ("text", "note"), append_eod=True
    )
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")], recipe


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def until_death(
    step: int, inputs: list[str], prefix: str, recipe: EncodeSettings, names: tuple[str, ...] = STEPS
) -> int | None:
    """Run in a process that is gone before (odd ``step``) or after (even) a durable step; how it ended, None:
    whole.
    """
    child, unlink = os.fork(), os.unlink
    if not child:
        left = (step + 1) // 2

        def dying(real):
            def call(*arguments, **options):
                nonlocal left
                if real is unlink and not os.path.lexists(arguments[0]):
                    return real(*arguments, **options)  # changes nothing
                left -= 1
                if left == 0 and step % 2:
                    os._exit(KILLED)
                result = real(*arguments, **options)
                if left == 0:
                    os._exit(KILLED)
                return result

            return call

        for name in names:
            setattr(os, name, dying(getattr(os, name)))
        status = 1
        try:
            preprocess(inputs, prefix, recipe, save_seconds=0)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, KILLED), code
    return code or None


@pytest.mark.processes
@pytest.mark.parametrize(
    ("names", "steps"),
    [(STEPS, range(1, 2000, 23)), (NAMES, range(1, 2000))],
    ids=["all, some", "names, each"],
)
def test_a_death_at_a_durable_step(
    tmp_path: Path, job: tuple[list[str], EncodeSettings], names: tuple[str, ...], steps: range
) -> None:
    inputs, recipe = job
    preprocess(inputs, str(tmp_path / "whole" / "p"), recipe)
    expected = outputs(tmp_path / "whole")
    assert len(expected) == 6
    pairs = [
        [name.removesuffix(".idx") + ending for ending in (".bin", ".idx")]
        for name in expected
        if name.endswith(".idx")
    ]
    before = {name: b"older " + data for name, data in expected.items()}
    deaths = 0
    for step in steps:
        folder = tmp_path / f"at-{step}"
        folder.mkdir()
        for name, data in before.items():
            (folder / name).write_bytes(data)
        if until_death(step, inputs, str(folder / "p"), recipe, names) is None:
            break
        deaths += 1
        found = outputs(folder)
        for pair in pairs:  # an index in place means that the pair is whole: the older one, or the new one
            real = [found.get(name) for name in pair]
            assert real[1] is None or real in (
                [before[name] for name in pair],
                [expected[name] for name in pair],
            ), step
        preprocess(inputs, str(folder / "p"), recipe, save_seconds=0)
        assert outputs(folder) == expected, step
    assert deaths > 8


@pytest.mark.processes
def test_many_deaths_of_one_run(tmp_path: Path, job: tuple[list[str], EncodeSettings]) -> None:
    """Each life gets a few steps further; with the bytes of one run, in fewer lives than it has steps."""
    inputs, recipe = job
    preprocess(inputs, str(tmp_path / "whole" / "p"), recipe)
    lives = 0
    while until_death(50, inputs, str(tmp_path / "out" / "p"), recipe):
        lives += 1
        assert lives < 100
    assert lives > 3
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_what_was_done_is_not_done_again(tmp_path: Path, job: tuple[list[str], EncodeSettings]) -> None:
    inputs, recipe = job
    until_death(120, inputs, str(tmp_path / "out" / "p"), recipe)
    places: list[int] = []
    documents: list[int] = []
    preprocess(
        inputs,
        str(tmp_path / "out" / "p"),
        recipe,
        progress=lambda done, total, count: (places.append(done), documents.append(count)),
    )
    assert places[0] > 0 and documents[0] > 0
    assert places == sorted(places) and places[-1] == sum(os.path.getsize(path) for path in inputs)


def test_other_settings_and_changed_inputs_are_refused_until_overwritten(
    tmp_path: Path, job: tuple[list[str], EncodeSettings]
) -> None:
    inputs, recipe = job
    prefix = str(tmp_path / "out" / "p")
    until_death(120, inputs, prefix, recipe)
    left = outputs(tmp_path / "out")
    other = replace(recipe, append_eod=False)
    with pytest.raises(
        ConfigError,
        match=r"--append-eod = False: differs from True in the unfinished run that wrote .*p\.journal",
    ):
        preprocess(inputs, prefix, other)
    Path(recipe.tokenizer.tokenizer_model or "").write_text(
        Path(recipe.tokenizer.tokenizer_model or "").read_text() + "\n"
    )
    with pytest.raises(
        ConfigError,
        match=r"--tokenizer-model = a file with SHA-256 \w+\.\.\.: differs from a file with SHA-256",
    ):
        preprocess(inputs, prefix, recipe)
    bpe.train_bpe(iter([inspect.getsource(json.decoder)]), 400, recipe.tokenizer.tokenizer_model or "")
    text = Path(inputs[0]).read_text()
    Path(inputs[0]).write_text(text.replace("{", "{ ", 1))
    with pytest.raises(
        DataError, match=r"a\.jsonl: the input has changed since the unfinished run"
    ) as caught:
        preprocess(inputs, prefix, recipe)
    assert "--overwrite" in caught.value.remedy
    assert outputs(tmp_path / "out") == left
    assert "p_note_document.bin.partial" in left
    recipe = replace(recipe, keys=("text",))
    preprocess(inputs, prefix, recipe, overwrite=True)
    preprocess(inputs, str(tmp_path / "whole" / "p"), recipe)
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_another_number_of_workers_or_back_end_goes_on(
    tmp_path: Path, job: tuple[list[str], EncodeSettings]
) -> None:
    inputs, recipe = job
    until_death(120, inputs, str(tmp_path / "out" / "p"), recipe)
    slower = replace(recipe, backend="tokenizers")
    starts: list[int] = []
    preprocess(
        inputs, str(tmp_path / "out" / "p"), slower, progress=lambda done, total, count: starts.append(done)
    )
    assert starts[0] > 0
    preprocess(inputs, str(tmp_path / "whole" / "p"), recipe)
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


@pytest.mark.parametrize("ending", ["bin", "sizes", "counts"])
def test_what_was_saved_and_has_changed_is_not_gone_on_with(
    tmp_path: Path, job: tuple[list[str], EncodeSettings], ending: str
) -> None:
    inputs, recipe = job
    until_death(120, inputs, str(tmp_path / "out" / "p"), recipe)
    saved = tmp_path / "out" / f"p_note_document.{ending}.partial"
    data = bytearray(saved.read_bytes())
    data[0] ^= 1
    saved.write_bytes(data)
    with pytest.raises(
        DataError,
        match=rf"p_note_document\.{ending}\.partial: the file has changed since an unfinished run saved it",
    ) as caught:
        preprocess(inputs, str(tmp_path / "out" / "p"), recipe)
    assert "starts from the beginning" in caught.value.remedy
    assert not [name for name in outputs(tmp_path / "out") if not name.startswith("p_text_document.")]
    preprocess(inputs, str(tmp_path / "out" / "p"), recipe)
    preprocess(inputs, str(tmp_path / "whole" / "p"), recipe)
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


@pytest.mark.parametrize(
    "record", ['{"n": 1}', '{"place": [0], "position": 1, "pairs": [], "complete": false}']
)
def test_a_journal_that_no_run_writes_is_refused(
    tmp_path: Path, job: tuple[list[str], EncodeSettings], record: str
) -> None:
    inputs, recipe = job
    until_death(120, inputs, str(tmp_path / "out" / "p"), recipe)
    with open(tmp_path / "out" / "p.journal", "a") as stream:
        stream.write(record + "\n")
    with pytest.raises(
        DataError, match=r"p\.journal: the journal has a line that this program did not write"
    ) as caught:
        preprocess(inputs, str(tmp_path / "out" / "p"), recipe)
    assert "--overwrite" in caught.value.remedy
    preprocess(inputs, str(tmp_path / "out" / "p"), recipe, overwrite=True)


def test_an_input_that_another_program_writes_to_is_not_trusted(
    tmp_path: Path, job: tuple[list[str], EncodeSettings]
) -> None:
    inputs, recipe = job
    prefix, more = str(tmp_path / "out" / "p"), iter(['{"text": "more", "note": "of it"}\n'])

    def write(done: int, total: int, documents: int) -> None:
        with open(inputs[0], "a") as stream:
            stream.write(next(more, ""))

    with pytest.raises(
        DataError, match=r"a\.jsonl: the input changed while it was read \(it had \d+ bytes and now has"
    ) as caught:
        preprocess(inputs, prefix, recipe, progress=write)
    assert "--overwrite" in caught.value.remedy
    assert not [name for name in outputs(tmp_path / "out") if name.endswith((".bin", ".idx", ".json"))]
    preprocess(inputs, prefix, recipe, overwrite=True)
    preprocess(inputs, str(tmp_path / "whole" / "p"), recipe)
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_an_input_that_goes_away_is_told(tmp_path: Path, job: tuple[list[str], EncodeSettings]) -> None:
    inputs, recipe = job
    with pytest.raises(DataError, match=r"b\.txt cannot be read: No such file"):
        preprocess(
            inputs,
            str(tmp_path / "out" / "p"),
            recipe,
            progress=lambda *_: Path(inputs[1]).unlink(missing_ok=True),
        )
    assert not outputs(tmp_path / "out")
