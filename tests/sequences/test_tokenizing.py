"""Files to token stores: the same for any number of workers, whole or not at all, resumed, and what is left out."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from processive import bio, chem
from processive.errors import ConfigError, InputError, ProcessiveError
from processive.sequences import TokenStore, read_blocks, read_unusable, tokenize_files, tokenizing
from processive.sequences.workers import map_in_order

PROTEIN = bio.ProteinTokenizer()


def files_of(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def write_fasta(path: Path, rng: np.random.Generator, records: int, *, bad: tuple[int, ...] = ()) -> list[str]:
    texts = ["".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), rng.integers(1, 200))) for _ in range(records)]
    texts = [text if number not in bad else text + "1" for number, text in enumerate(texts, 1)]
    lines = ("\n".join(text[i : i + 60] for i in range(0, len(text), 60)) for text in texts)
    path.write_text("".join(f">P{n} protein\n{body}\n" for n, body in enumerate(lines, 1)))
    return texts


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of some kilobytes in many blocks."""
    from processive.bio import readers
    from processive.chem import readers as chem_readers

    for module in (readers, chem_readers):
        monkeypatch.setattr(module, "read_blocks", partial(read_blocks, size=500))


def test_blocks_keep_records_whole(tmp_path):
    path = tmp_path / "a.fasta"
    path.write_text(">a\nAC\nGT\n>b\nA\n>c\n\n>d\nACGTACGT")
    for size in range(1, 40):
        blocks = list(read_blocks(path, before=">", size=size))
        assert "".join(blocks) == path.read_text()
        assert all(block.startswith(">") and block.endswith("\n") for block in blocks[:-1])
    assert list(read_blocks(path, before=">", size=1)) == [">a\nAC\nGT\n", ">b\nA\n", ">c\n\n", ">d\nACGTACGT"]
    assert list(read_blocks(path, size=4)) == [">a\nAC\n", "GT\n>b\n", "A\n>c\n", "\n>d\n", "ACGTACGT"]


@pytest.mark.parametrize("packed", [False, True])
def test_chunks_of_fasta_are_what_read_reads(tmp_path, rng, small_blocks, packed):
    path = tmp_path / "p.fasta"
    texts = write_fasta(path, rng, 40, bad=(7, 40))
    text = "; made by hand\n\n" + path.read_text().replace(">P3 ", "; a comment\n>P3 ") + ">empty\n>stop\nMK*\n"
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    store = tokenize_files({"p": partial(bio.chunks, path, PROTEIN)}, PROTEIN, tmp_path / "s", on_error="skip")
    records = bio.read(path, PROTEIN)
    wanted = bio.tokenize(records, PROTEIN)
    assert [ids.tolist() for ids in store] == [ids.tolist() for ids in wanted] and len(wanted) == len(texts) - 1
    left_out = [record for _, record in read_unusable(store)]
    assert [(r.number, r.name) for r in left_out] == [(r.number, r.name) for r in records.rejected]
    assert [r.number for r in left_out] == [7, 40, 41]
    assert "'1'" in left_out[0].reason and store.meta["records"] == {"p": {"records": 42, "unusable": 3}}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.smi", "smiles name\nCCO ethanol\n\n# comment\nC?!\tbad\nc1ccccc1\n" + "CCN x\n" * 300 + "X bad"),
        ("a.csv", 'name,smiles\n"ethanol\nwater",CCO\nbad,C!\nbenzene,c1ccccc1\n'),
        ("a.txt", "CCO\nCCN"),
    ],
)
def test_chunks_of_molecules_are_what_read_reads(tmp_path, small_blocks, name, text):
    path = tmp_path / name
    path.write_text(text)
    tokenizer = chem.SmilesTokenizer()
    store = tokenize_files({name: partial(chem.chunks, path, tokenizer)}, tokenizer, tmp_path / "s", on_error="skip")
    records = chem.read(path, sanitize=False)
    assert [ids.tolist() for ids in store] == [ids.tolist() for ids in chem.tokenize(records, tokenizer)]
    left_out = [record for _, record in read_unusable(store)]
    assert [(r.number, r.name) for r in left_out] == [(r.number, r.name) for r in records.rejected]


def test_molecules_are_checked_when_asked(tmp_path):
    path = tmp_path / "a.smi"
    path.write_text("CCO\nC1CC\n")  # a ring that does not close is tokens and no molecule
    tokenizer = chem.SmilesTokenizer()
    for sanitize, kept in ((False, 2), (True, 1)):
        source = {"a": partial(chem.chunks, path, tokenizer, sanitize=sanitize)}
        assert len(tokenize_files(source, tokenizer, tmp_path / f"s{sanitize}", on_error="skip")) == kept


def test_the_store_is_the_same_for_any_number_of_workers(tmp_path, rng):
    files = [tmp_path / "a.fasta", tmp_path / "b.fasta"]
    for file, bad in zip(files, ((3,), ()), strict=True):
        write_fasta(file, rng, 20_000, bad=bad)  # two blocks or more
    sources = {file.name: partial(bio.chunks, file, PROTEIN) for file in files}
    for workers in (1, 3):
        tokenize_files(sources, PROTEIN, tmp_path / f"w{workers}", workers=workers, on_error="skip")
    assert files_of(tmp_path / "w1") == files_of(tmp_path / "w3")
    assert set(files_of(tmp_path / "w1")) == {"offsets.bin", "store.json", "tokens.bin", "unusable.tsv"}
    assert len(TokenStore(tmp_path / "w3")) == 39_999


def test_a_record_that_cannot_be_used_stops_it_and_leaves_nothing(tmp_path, rng, small_blocks):
    path = tmp_path / "p.fasta"
    write_fasta(path, rng, 40, bad=(30, 35))
    with pytest.raises(InputError, match=r"p\.fasta, record 30 \(P30\)"):
        tokenize_files({"p.fasta": partial(bio.chunks, path, PROTEIN)}, PROTEIN, tmp_path / "s")
    assert [file.name for file in tmp_path.iterdir()] == ["p.fasta"]


def test_it_goes_on_after_being_stopped_at_any_chunk(tmp_path, rng, small_blocks, monkeypatch):
    monkeypatch.setattr(tokenizing, "NOTE_SECONDS", -1.0)  # a note after each chunk
    path = tmp_path / "p.fasta"
    write_fasta(path, rng, 40, bad=(9,))
    source = {"p": partial(bio.chunks, path, PROTEIN)}
    wanted = files_of(tokenize_files(source, PROTEIN, tmp_path / "whole", on_error="skip").path)
    encode = tokenizing._encode
    for stop in range(1, 9):
        out, done = tmp_path / f"stopped-{stop}", 0

        def stopping(chunk, tokenizer, stop=stop):
            nonlocal done
            done += 1
            if done == stop:
                raise KeyboardInterrupt
            return encode(chunk, tokenizer)

        monkeypatch.setattr(tokenizing, "_encode", stopping)
        with pytest.raises(KeyboardInterrupt):
            tokenize_files(source, PROTEIN, out, on_error="skip")
        assert not out.exists()
        if stop > 1:  # what was written behind the last note is dropped
            with (tmp_path / f"stopped-{stop}.partial" / "tokens.bin").open("ab") as tokens:
                tokens.write(b"half")
            with pytest.raises(ConfigError, match="other files"):
                tokenize_files(source, PROTEIN, out, on_error="skip", resume=True, identity={"inputs": "others"})
        chunks = 0

        def counting(chunk, tokenizer):
            nonlocal chunks
            chunks += 1
            return encode(chunk, tokenizer)

        monkeypatch.setattr(tokenizing, "_encode", counting)
        assert files_of(tokenize_files(source, PROTEIN, out, on_error="skip", resume=True).path) == wanted
        assert chunks <= len(list(bio.chunks(path, PROTEIN))) - (stop - 1)
        assert not (tmp_path / f"stopped-{stop}.partial").exists()
    assert done == 8


def test_without_resume_it_starts_again(tmp_path, rng):
    path = tmp_path / "p.fasta"
    write_fasta(path, rng, 5)
    (tmp_path / "s.partial").mkdir()
    (tmp_path / "s.partial" / "tokens.bin").write_bytes(b"half")
    store = tokenize_files({"p": partial(bio.chunks, path, PROTEIN)}, PROTEIN, tmp_path / "s")
    assert len(store) == 5
    with pytest.raises(ConfigError, match="exists already"):
        tokenize_files({"p": partial(bio.chunks, path, PROTEIN)}, PROTEIN, tmp_path / "s")


def test_killed_it_leaves_no_store_and_no_process(tmp_path, rng):
    """SIGKILL in the middle: no store, its workers end by themselves, and the same command makes the whole store."""
    path, out = tmp_path / "p.fasta", tmp_path / "s"
    write_fasta(path, rng, 1000)
    path.write_text(path.read_text() * 40)
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom functools import partial\nfrom processive import bio\n"
        "from processive.sequences import tokenize_files, tokenizing\n"
        "tokenizing.NOTE_SECONDS = -1.0\n"
        "if __name__ == '__main__':\n"
        "    t = bio.ProteinTokenizer()\n"
        f"    tokenize_files({{'p': partial(bio.chunks, {str(path)!r}, t)}}, t, {str(out)!r}, workers=2, resume=True)\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
    note = tmp_path / "s.partial" / "partial.json"
    deadline = time.monotonic() + 60
    while not note.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and note.exists() and not out.exists()
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("worker processes are left")
    assert subprocess.run([sys.executable, str(script)], check=True).returncode == 0
    assert len(TokenStore(out)) == 40_000
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.fasta", "run.py", "s"]


def test_nothing_usable(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("1\n2\n")
    with pytest.raises(InputError, match="No record can be used"):
        tokenize_files({"p": partial(bio.chunks, path, PROTEIN)}, PROTEIN, tmp_path / "s", on_error="skip")
    assert not (tmp_path / "s.partial").exists()


def test_results_come_in_order_and_errors_come_through():
    assert list(map_in_order(math.sqrt, range(20), workers=3)) == [math.sqrt(i) for i in range(20)]
    assert list(map_in_order(math.sqrt, range(2), workers=3)) == [0.0, 1.0]
    results = map_in_order(math.sqrt, [4, 9, -1, 16], workers=2)
    assert [next(results), next(results)] == [2.0, 3.0]
    with pytest.raises(ValueError, match="math domain"):
        next(results)


def test_a_worker_that_ends_by_itself_is_told():
    with pytest.raises(ProcessiveError, match="worker process ended"):
        list(map_in_order(os._exit, [1, 1, 1], workers=2))
