"""The corpora of the laboratory: the same text on every Python, split by document, and a report where it is not.

Interpreters are found by name on PATH; LORA_EDU_PYTHONS may name more, separated as PATH is.
"""

from __future__ import annotations

import ast
import codecs
import hashlib
import json
import os
import re
import shutil
import string
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from lora_edu.course import ROOT
from lora_edu.lab import corpus
from lora_edu.lab.corpus import PARTS, load

SOURCES = ("manual", "code")
LINES = [line.split() for line in corpus.LIST.read_text(encoding="ascii").splitlines()]
DOCUMENTS = [line for line in LINES if len(line) == 4]  # corpus, part, document, hashes
NAMES = ["python3", "python3.11", "python3.12", "python3.13", "python3.14", "/usr/bin/python3", sys.executable]


def run(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # -S: no site-packages, so the standard library alone.
    return subprocess.run([python, "-S", *arguments], capture_output=True, text=True, check=False, cwd=ROOT)


@lru_cache
def interpreters() -> dict[str, str]:
    """{version: command}, of every Python here from 3.11 on; a full version string, since builds differ."""
    named = [*NAMES, *filter(None, os.environ.get("LORA_EDU_PYTHONS", "").split(os.pathsep))]
    found = {}
    for command in filter(None, map(shutil.which, named)):
        asked = run(command, "-c", "import sys; print(sys.version if sys.version_info >= (3, 11) else '')")
        if asked.returncode == 0 and asked.stdout.strip():
            found.setdefault(asked.stdout.strip(), command)
    return found


def needs_all_pieces() -> None:
    for name in SOURCES:
        if not load(name).complete:
            pytest.skip(load(name).report())


@pytest.mark.parametrize("name", SOURCES)
def test_a_complete_text_has_the_listed_sha256(name: str) -> None:
    needs_all_pieces()
    listed = {line[1]: line[2] for line in LINES if line[0] == name and len(line) == 3}
    assert {part: hashlib.sha256(getattr(load(name), part).encode()).hexdigest() for part in PARTS} == listed


@pytest.mark.parametrize("python", interpreters().values(), ids=[v.split()[0] for v in interpreters()])
def test_every_python_here_has_the_same_text_or_says_what_is_missing(python: str) -> None:
    needs_all_pieces()
    code = (
        "import json; from lora_edu.lab.corpus import load; "
        "print(json.dumps({n: [c.missing, c.complete, c.sha256, c.report()] for n in "
        f"{[*SOURCES, 'shout', 'rot13']} for c in [load(n)]}}))"
    )
    done = run(python, "-c", code)
    assert done.returncode == 0, done.stderr
    for name, (missing, complete, sha256, report) in json.loads(done.stdout).items():
        if missing:
            assert not complete and report.startswith(
                f"{missing:,} of {load(name).pieces:,} pieces of '{name}' are not"
            )
        else:
            assert complete and sha256 == load(name).sha256


def test_the_command_makes_the_list_again(tmp_path: Path) -> None:
    made_from = LINES[0][1:]
    here = {version.split()[0]: command for version, command in interpreters().items()}
    if absent := [version for version in made_from if version not in here]:
        pytest.skip(f"corpus.txt is made from Python {', '.join(made_from)}; {', '.join(absent)} is not here.")
    files = [str(tmp_path / version) for version in made_from]
    for version, file in zip(made_from, files, strict=True):
        Path(file).write_text(run(here[version], "-m", "lora_edu.lab.corpus", "pieces").stdout)
    again = run(sys.executable, "-m", "lora_edu.lab.corpus", "list", *reversed(files)).stdout
    assert again.encode() == corpus.LIST.read_bytes()


def test_from_the_listed_pieces_alone_the_same_list_is_made() -> None:
    """Whatever Python is here: the rules accept every listed piece, and the split and the hashes follow from them."""
    needs_all_pieces()
    here = {"python": "3.11.2", "manual": {}, "code": {}}
    modules = {document for _, _, document, _ in DOCUMENTS if not document.startswith("topics/")}
    listed = {(name, document): hashes for name, _, document, hashes in DOCUMENTS}
    for name, document, texts in corpus._pieces(corpus.LIBRARY, sorted(modules)):
        rule = corpus.is_prose if name == "manual" else corpus.is_code
        digests = {hashlib.sha256(text.encode()).hexdigest()[:16]: text for text in texts if rule(text)}
        hashes = re.findall("." * 16, listed.get((name, document), ""))
        here[name][document] = [digests[digest] for digest in hashes]
    assert corpus.make_list([here]).splitlines()[1:] == [" ".join(line) for line in LINES[1:]]


def test_the_list_is_small_and_holds_no_text() -> None:
    assert corpus.LIST.stat().st_size < 250_000
    assert LINES[0][0] == "python"
    for name, part, document, hashes in DOCUMENTS:
        assert name in SOURCES and part in PARTS and re.fullmatch(r"[\w/-]+", document)
        assert re.fullmatch(r"([0-9a-f]{16})+", hashes)
    pieces = [digest for *_, hashes in DOCUMENTS for digest in re.findall("." * 16, hashes)]
    assert len(pieces) == len(set(pieces)) == load("manual").pieces + load("code").pieces


def test_documents_are_split_whole_and_a_package_is_in_one_part_of_both_corpora() -> None:
    parts: dict[str, set[str]] = {}
    for _, part, document, _ in DOCUMENTS:
        package = document if document.startswith("topics/") else document.split("/")[0]
        parts.setdefault(package, set()).add(part)
    assert {package for package, found in parts.items() if len(found) > 1} == set()
    for name in SOURCES:
        text = load(name)
        sizes = np.array([len(getattr(text, part)) for part in PARTS])
        np.testing.assert_allclose(sizes / sizes.sum(), [0.85, 0.05, 0.10], atol=0.01)
        held_out = Counter(part for corpus_name, part, *_ in DOCUMENTS if corpus_name == name)
        assert min(held_out[part] for part in ("validation", "test")) >= 20


def test_the_list_is_what_all_pythons_share_in_the_order_of_the_oldest() -> None:
    old = {
        "python": "3.9.20",
        "manual": {"a": ["p", "q", "r", "p"], "b/c": ["r", "s"], "z": ["t"]},
        "code": {"a": ["f"]},
    }
    new = {
        "python": "3.10.1",
        "manual": {"a": ["r", "p", "x"], "b/c": ["s", "r", "q"], "y": ["t"]},
        "code": {"a": ["f"]},
    }
    head, *lines = corpus.make_list([new, old]).splitlines()
    assert head == "python 3.9.20 3.10.1"
    found = {tuple(line.split()[:3:2]): line.split()[3] for line in lines if len(line.split()) == 4}
    digest = {text: hashlib.sha256(text.encode()).hexdigest()[:16] for text in "pqrstf"}
    # q and t are elsewhere in the other; r is taken by the first document that has it.
    assert found == {
        ("manual", "a"): digest["p"] + digest["r"],
        ("manual", "b/c"): digest["s"],
        ("code", "a"): digest["f"],
    }


def test_shout_and_rot13_change_letters_only() -> None:
    manual, shout, rot13 = load("manual"), load("shout"), load("rot13")
    turned = str.maketrans(
        string.ascii_letters,
        string.ascii_lowercase[13:]
        + string.ascii_lowercase[:13]
        + string.ascii_uppercase[13:]
        + string.ascii_uppercase[:13],
    )
    for part in PARTS:
        text = getattr(manual, part)
        assert getattr(shout, part) == text.upper() != text
        assert getattr(rot13, part) == text.translate(turned) != text
    assert (shout.pieces, shout.complete) == (rot13.pieces, rot13.complete) == (manual.pieces, manual.complete)
    assert len({manual.sha256, shout.sha256, rot13.sha256, load("code").sha256}) == 4


PROSE = "Return the first item of the queue. If the queue is empty,\nthen wait until an item arrives."
TOPIC = "An object’s type is “fixed”; see the section on the standard\ntypes for what each of them can do…"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (PROSE, PROSE),
        (f"    {PROSE}".replace("\n", "\n    "), PROSE),
        (f"* {PROSE}".replace("\n", "\n  "), PROSE),
        (TOPIC, 'An object\'s type is "fixed"; see the section on the standard\ntypes for what each of them can do...'),
        ("Return the first item of the queue.", None),  # short
        (PROSE[:-1], None),  # no end
        (PROSE.replace("an item", "an œuvre"), None),
        (">>> queue.put(1), queue.put(2), queue.put(3)\n>>> queue.get(), queue.get(), queue.get()\n(1, 2, 3)", None),
        ("put(item, block=True, timeout=None), get(block=True, timeout=None), get_nowait(), put_nowait(item)", None),
        ("Name        Meaning of the name\n----        -------------------\nmaxsize     how many items fit.", None),
        (
            "The classes of this module are as follows, each with its own use:\n  Queue is first in,\n    first out.",
            None,
        ),
        ('and_expr ::= shift_expr | and_expr "&" shift_expr\nor_expr  ::= xor_expr | or_expr "|" xor_expr :', None),
    ],
)
def test_what_is_prose(text: str, kept: str | None) -> None:
    (paragraph,) = corpus.paragraphs(text)
    assert (paragraph if corpus.is_prose(paragraph) else None) == kept


def test_docstrings_and_functions_of_a_module() -> None:
    tree = ast.parse('''
"""Module.

Second."""
class C:
    """Class."""
    def method(self):
        """Method."""
        x = "kept"
        if x:
            def inner():
                """Inner."""
            async def other():
                """Other."""
                return x
        return f"{x!r}"  # a comment
def empty():
    """Only this."""
''')
    assert [*corpus.docstrings(tree)] == ["Module.", "Second.", "Class.", "Method.", "Only this."]
    assert [*corpus.functions(tree)] == [
        "def method(self):\n    x = 'kept'\n    if x:\n\n        def inner():\n            pass\n\n"
        "        async def other():\n            return x\n    return f'{x!r}'",
        "def empty():\n    pass",
    ]


def test_a_library_that_lacks_pieces_is_reported_and_still_gives_text(tmp_path: Path) -> None:
    needs_all_pieces()
    for document in ("queue", "json/decoder", "heapq"):
        (tmp_path / document).parent.mkdir(exist_ok=True)
        shutil.copy(corpus.LIBRARY / f"{document}.py", tmp_path / f"{document}.py")
    source = (tmp_path / "queue.py").read_text(encoding="utf-8")
    changed = source.replace("Create a queue object with a given maximum size", "Create a queue object with a size")
    (tmp_path / "queue.py").write_text(changed, encoding="utf-8")
    (tmp_path / "heapq.py").write_text("def broken(:", encoding="utf-8")
    here, whole = load("code", tmp_path), load("code")
    kept = {document: len(hashes) // 16 for name, _, document, hashes in DOCUMENTS if name == "code"}
    assert changed != source
    assert here.pieces == whole.pieces
    assert here.pieces - here.missing == kept["queue"] + kept["json/decoder"]
    assert not here.complete and here.sha256 != whole.sha256
    assert "        while self.unfinished_tasks:\n            self.all_tasks_done.wait()\n" in here.test
    version = sys.version.split()[0]
    assert here.report().startswith(
        f"{here.missing:,} of {here.pieces:,} pieces of 'code' are not in this Python ({version}): its"
    )


def test_a_changed_paragraph_is_the_one_piece_that_is_missing(tmp_path: Path) -> None:
    needs_all_pieces()
    shutil.copytree(
        corpus.LIBRARY / "pydoc_data", tmp_path / "pydoc_data", ignore=shutil.ignore_patterns("__pycache__")
    )
    topics = tmp_path / "pydoc_data" / "topics.py"
    before = load("manual", tmp_path / ".." / tmp_path.name)  # the same folder under another name: the load is cached
    source = topics.read_text(encoding="utf-8")
    sentence = "is a null operation"
    assert sentence in source
    topics.write_text(source.replace(sentence, "does nothing at all"), encoding="utf-8")
    after = load("manual", tmp_path)
    assert (before.missing > 0, after.missing - before.missing) == (True, 1)


def test_a_python_without_sources_says_so(tmp_path: Path) -> None:
    for library in (tmp_path, tmp_path / "python311.zip"):
        for name in (*SOURCES, "shout"):
            text = load(name, library)
            assert (text.missing, text.complete) == (text.pieces, False)
            assert "no sources" in text.report() and "\n" not in text.report()


def test_encode_and_decode() -> None:
    assert len(corpus.CHARACTERS) == len(set(corpus.CHARACTERS)) == 96
    ids = corpus.encode(corpus.CHARACTERS)
    assert ids.tolist() == list(range(96)) and ids.dtype == np.uint8
    for text in ("", "\n", "def f(x):\n    return x\n", load("code").validation):
        assert corpus.decode(corpus.encode(text)) == text == corpus.decode(corpus.encode(text).tolist())


def test_bad_input_gets_one_sentence() -> None:
    with pytest.raises(
        ValueError, match=r"^There is no corpus 'docs'; there are 'manual', 'code', 'shout', 'rot13'\.$"
    ):
        load("docs")
    for text, named in (("a\tb", r"Character 1, '\\t', is"), ("naïve", r"Character 2, 'ï', is"), ("\x7f", r"'\\x7f'")):
        with pytest.raises(ValueError, match=named):
            corpus.encode(text)
    for ids in ([3, 96], [-1], np.array([200])):
        with pytest.raises(ValueError, match=r"^(96|-1|200) is not an id of the vocabulary: they run from 0 to 95\.$"):
            corpus.decode(ids)
    assert run(sys.executable, "-m", "lora_edu.lab.corpus", "list").returncode == 2


def test_only_characters_of_the_vocabulary_and_no_empty_part() -> None:
    for name in (*SOURCES, "shout", "rot13"):
        for part in PARTS:
            text = getattr(load(name), part)
            assert set(text) <= set(corpus.CHARACTERS) and text.endswith("\n")
    assert codecs.encode(load("rot13").test, "rot13") == load("manual").test
