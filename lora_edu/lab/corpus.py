"""Real text for the laboratory: prose and code that every CPython carries.

The project ships no one else's text. It ships `corpus.txt`, a list of hashes, and reads the text from the running
Python's own library. A piece is used when its hash is on the list; the list fixes the order and the split, so the
corpus is the same byte for byte on every Python that has all the pieces. `Corpus.complete` says whether it is.

    manual   paragraphs of the language manual (pydoc_data.topics) and of the library's docstrings
    code     functions and methods of the library without docstrings, in the layout of ast.unparse
    shout    the manual in capitals
    rot13    the manual in ROT13: each letter moved 13 places

The library is read as text and parsed, never imported. The maintainer makes the list:

    python -m lora_edu.lab.corpus pieces > FILE       under each Python, with its standard library alone
    python -m lora_edu.lab.corpus list FILE ... > lora_edu/lab/corpus.txt

A piece is listed when every one of these Pythons has it, in the document of the same name.
"""

from __future__ import annotations

import ast
import codecs
import hashlib
import json
import re
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))  # the vocabulary: newline and printable ASCII, 96 in all
LIBRARY = Path(sysconfig.get_path("stdlib"))
LIST = Path(__file__).with_name("corpus.txt")
PARTS = ("train", "validation", "test")
HELD_OUT = {"test": 0.10, "validation": 0.05}  # shares of the characters

_FOREIGN = re.compile(r"[^\n -~]")
_TYPOGRAPHY = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "..."})
_WORD = re.compile(r"[(\"'*`]*[A-Za-z][a-z]*(?:['-][a-z]+)*[)\"'*`]*[.,;:!?]*[)\"']*")
_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
_DEFINITION = (*_FUNCTION, ast.ClassDef)
# Not read: other people's packages, tests, tables, what needs a screen, and files that distributions patch.
_SKIPPED = frozenset(
    "site-packages dist-packages test tests idle_test lib2to3 encodings pydoc_data idlelib tkinter turtledemo turtle "
    "ensurepip venv site sysconfig platform ctypes webbrowser _osx_support _aix_support".split()
)
# Hexadecimal digits of a piece's SHA-256 on the list: 64 bits. The whole text's SHA-256 is there in full.
_DIGITS = 16
_CHANGES: dict[str, tuple[str, Callable[[str], str]]] = {
    "manual": ("manual", str),
    "code": ("code", str),
    "shout": ("manual", str.upper),
    "rot13": ("manual", lambda text: codecs.encode(text, "rot13")),
}


@dataclass(frozen=True)
class Corpus:
    """One text in three parts, split by document. `complete`: equal byte for byte to what the list was made from."""

    name: str
    train: str
    validation: str
    test: str
    pieces: int  # on the list
    missing: int  # of these, not in this Python
    complete: bool
    sha256: str  # of the three parts in a row

    def report(self) -> str:
        """One sentence: what of this corpus is missing here."""
        python = ".".join(map(str, sys.version_info[:3]))
        if self.complete:
            return f"All {self.pieces:,} pieces of {self.name!r} are in this Python ({python})."
        why = "it carries no sources of its library" if self.missing == self.pieces else "its library differs"
        return (
            f"{self.missing:,} of {self.pieces:,} pieces of {self.name!r} are not in this Python ({python}): "
            f"{why}, and numbers trained on the rest differ from the stored ones."
        )


@lru_cache
def load(name: str, library: Path = LIBRARY) -> Corpus:
    """The corpus "manual", "code", "shout" or "rot13", read from the sources in the folder `library`."""
    if name not in _CHANGES:
        raise ValueError(f"There is no corpus {name!r}; there are {', '.join(map(repr, _CHANGES))}.")
    source, change = _CHANGES[name]
    found = _found(library)
    parts = {}
    pieces = missing = 0
    complete = True
    for part in PARTS:
        wanted = [(d, h) for d, hashes in _listed().documents[source, part].items() for h in hashes]
        here = [found[source, d, h] for d, h in wanted if (source, d, h) in found]
        text = _text(here)
        pieces += len(wanted)
        missing += len(wanted) - len(here)
        complete &= _sha256(text) == _listed().sha256[source, part]
        parts[part] = change(text)
    return Corpus(
        name, **parts, pieces=pieces, missing=missing, complete=complete, sha256=_sha256("".join(parts.values()))
    )


def encode(text: str) -> NDArray[np.uint8]:
    """The place of each character of `text` in `CHARACTERS`."""
    import numpy as np

    if foreign := _FOREIGN.search(text):
        raise ValueError(
            f"Character {foreign.start()}, {foreign[0]!r}, is not in the vocabulary: newline and printable ASCII."
        )
    codes = np.frombuffer(text.encode("ascii"), np.uint8)
    return np.where(codes == 10, 0, codes - 31).astype(np.uint8)


def decode(ids: ArrayLike) -> str:
    """The text of `ids`: decode(encode(text)) == text."""
    import numpy as np

    ids = np.asarray(ids, dtype=np.int64)
    if wrong := ids[(ids < 0) | (ids >= len(CHARACTERS))].tolist():
        raise ValueError(f"{wrong[0]} is not an id of the vocabulary: they run from 0 to {len(CHARACTERS) - 1}.")
    return np.where(ids == 0, 10, ids + 31).astype(np.uint8).tobytes().decode("ascii")


# --- what a piece is --------------------------------------------------------------------------------------------------


def is_prose(paragraph: str) -> bool:
    """60 to 2000 characters with an even left margin and no columns, that end as a sentence does, and of which 7 in
    10 words are plain words: no doctests, no tables, no signatures, no lists of names.
    """
    words = paragraph.split()
    return (
        60 <= len(paragraph) <= 2000
        and not _FOREIGN.search(paragraph)
        and "\n " not in paragraph
        and "   " not in paragraph
        and paragraph[-1] in ".:!?)"
        and sum(_WORD.fullmatch(word) is not None for word in words) >= 0.7 * len(words)
    )


def is_code(function: str) -> bool:
    """120 to 2000 characters: no stubs, no tables."""
    return 120 <= len(function) <= 2000 and not _FOREIGN.search(function)


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of `text`, without margin, mark of a list item and typographic quotes."""
    for paragraph in re.split(r"\n\s*\n", text.translate(_TYPOGRAPHY)):
        yield cleandoc(re.sub(r"^\s*[-*] +", "", paragraph)).strip()


def docstrings(tree: ast.Module) -> Iterator[str]:
    """The paragraphs of the docstrings of a module, its classes and their functions."""
    for node in (tree, *_definitions(tree)):
        yield from paragraphs(ast.get_docstring(node) or "")


def functions(tree: ast.Module) -> Iterator[str]:
    """The functions of a module and of its classes, up to 60 lines long; docstrings are taken out of the tree."""
    for node in [*_statements(tree)]:
        if isinstance(node, _DEFINITION) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass(lineno=node.lineno)]
    for node in _definitions(tree):
        if isinstance(node, _FUNCTION) and (node.end_lineno or 0) - node.body[0].lineno < 60:
            yield ast.unparse(node)


def topics(tree: ast.Module) -> Iterator[tuple[str, list[str]]]:
    """The paragraphs of the language manual, from the source of pydoc_data.topics: ("topics/assert", [...]), ..."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for name, text in ast.literal_eval(node.value).items():
                yield f"topics/{name}", [*paragraphs(text)]


def _definitions(node: ast.AST) -> Iterator[Any]:
    """Classes and functions; those inside functions belong to the outer one."""
    for child in getattr(node, "body", ()):
        if isinstance(child, _DEFINITION):
            yield child
        if isinstance(child, ast.ClassDef):
            yield from _definitions(child)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every statement below `node`; ast.walk would visit every expression too."""
    for field in ("body", "orelse", "handlers", "finalbody", "cases"):
        for child in getattr(node, field, ()):
            yield child
            yield from _statements(child)


def _parse(library: Path, document: str) -> ast.Module:
    """The source of a document; an empty one where there is none, as in a zipped library."""
    try:
        return ast.parse((library / f"{document}.py").read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ast.Module([], [])


def _pieces(library: Path, modules: Iterable[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Corpus, document and texts, of the language manual and of `modules`."""
    for topic, texts in topics(_parse(library, "pydoc_data/topics")):
        yield "manual", topic, texts
    for module in modules:
        tree = _parse(library, module)
        yield "manual", module, [*docstrings(tree)]
        yield "code", module, [*functions(tree)]


def _text(pieces: Iterable[str]) -> str:
    return "\n\n".join(pieces) + "\n"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- the list ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _List:
    pythons: list[str]
    sha256: dict[tuple[str, str], str]  # (corpus, part): of the text
    documents: dict[tuple[str, str], dict[str, list[str]]]  # (corpus, part): document: hashes of its pieces


@lru_cache
def _listed() -> _List:
    listed = _List([], {}, defaultdict(dict))
    for line in LIST.read_text("ascii").splitlines():
        kind, *rest = line.split()
        if kind == "python":
            listed.pythons.extend(rest)
        elif len(rest) == 2:
            listed.sha256[kind, rest[0]] = rest[1]
        else:
            listed.documents[kind, rest[0]][rest[1]] = re.findall("." * _DIGITS, rest[2])
    return listed


@lru_cache
def _found(library: Path) -> dict[tuple[str, str, str], str]:
    """(corpus, document, hash): piece, of all documents on the list. About 2 s."""
    documents = {document for part in _listed().documents.values() for document in part}
    modules = sorted(document for document in documents if not document.startswith("topics/"))
    return {
        (corpus, document, _sha256(text)[:_DIGITS]): text
        for corpus, document, texts in _pieces(library, modules)
        for text in texts
    }


def every_piece(library: Path = LIBRARY) -> dict[str, Any]:
    """What the command `pieces` prints: {"python": version, corpus: {document: pieces}}."""
    paths = (path.relative_to(library).with_suffix("") for path in sorted(library.rglob("*.py")))
    modules = [path.as_posix() for path in paths if _SKIPPED.isdisjoint(path.parts)]
    pieces: dict[str, Any] = {"python": ".".join(map(str, sys.version_info[:3])), "manual": {}, "code": {}}
    for corpus, document, texts in _pieces(library, modules):
        pieces[corpus][document] = [*filter(is_prose if corpus == "manual" else is_code, texts)]
    return pieces


def make_list(pythons: list[dict[str, Any]]) -> str:
    """The list of the pieces that all of `pythons` have, in the order of the oldest."""
    pythons = sorted(pythons, key=lambda python: [*map(int, python["python"].split("."))])
    corpora = {corpus: _common(pythons, corpus) for corpus in ("manual", "code")}
    part_of = _split(corpora)
    lines = ["python " + " ".join(python["python"] for python in pythons)]
    for corpus, documents in corpora.items():
        for part in PARTS:
            chosen = {document: texts for document, texts in documents.items() if part_of[_package(document)] == part}
            lines.append(f"{corpus} {part} {_sha256(_text(text for texts in chosen.values() for text in texts))}")
            for document, texts in chosen.items():
                lines.append(f"{corpus} {part} {document} {''.join(_sha256(text)[:_DIGITS] for text in texts)}")
    return "\n".join(lines) + "\n"


def _common(pythons: list[dict[str, Any]], corpus: str) -> dict[str, list[str]]:
    """The pieces of each document that all Pythons have there, each piece once."""
    oldest, *others = (python[corpus] for python in pythons)
    seen: set[str] = set()
    common = {}
    for document in sorted(oldest):
        shared = set(oldest[document]).intersection(*(other.get(document, ()) for other in others)) - seen
        if shared:
            common[document] = [text for text in dict.fromkeys(oldest[document]) if text in shared]
            seen |= shared
    return common


def _split(corpora: dict[str, dict[str, list[str]]]) -> dict[str, str]:
    """The part of each package. Held out are packages in the order of their names' hashes, as long as they fit.

    A package is in the same part of every corpus: nothing held out in one is trained on in another. Each fills at
    most a fifth of its part, so that a part is never a few documents.
    """
    sizes: dict[str, Counter[str]] = defaultdict(Counter)
    for corpus, documents in corpora.items():
        for document, texts in documents.items():
            sizes[_package(document)]["topics" if document.startswith("topics/") else corpus] += sum(map(len, texts))
    total = sum(sizes.values(), Counter())
    part_of = dict.fromkeys(sorted(sizes, key=_sha256), "train")
    for part, share in HELD_OUT.items():
        room = Counter({source: int(share * size) for source, size in total.items()})
        largest = Counter({source: size // 5 for source, size in room.items()})
        for package in part_of:
            if part_of[package] == "train" and sizes[package] <= largest and sizes[package] <= room:
                part_of[package] = part
                room -= sizes[package]
    return part_of


def _package(document: str) -> str:
    """The outermost package of a module; a topic is its own."""
    return document if document.startswith("topics/") else document.split("/")[0]


def main(arguments: list[str]) -> int:
    match arguments:
        case ["pieces"]:
            json.dump(every_piece(), sys.stdout)
        case ["list", *files] if files:
            print(make_list([json.loads(Path(file).read_text()) for file in files]), end="")
        case _:
            print("python -m lora_edu.lab.corpus pieces | list FILE ...", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
