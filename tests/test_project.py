"""The project around the chapters: imports, pins, environments, and a README that keeps its promises."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from conftest import APPENDICES
from lora_edu.course import ROOT, chapters
from tools.refresh import missing

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NEEDED = [
    Requirement(text)
    for texts in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in texts
]


def pins() -> dict[str, list[Requirement]]:
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.lstrip().startswith("#"):
            pin = Requirement(line.split("#")[0].strip())
            found.setdefault(pin.name.lower(), []).append(pin)
    return found


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_is_free() -> None:
    heavy = ("torch", "numpy", "matplotlib", "transformers", "peft")
    assert run(f"import sys, lora_edu; print([m for m in {heavy} if m in sys.modules])").strip() == "[]"


def test_the_core_imports_neither_peft_nor_transformers() -> None:
    code = "import sys; from lora_edu import LoRALinear, lora_linear; print([m for m in ('transformers', 'peft', 'IPython') if m in sys.modules])"
    assert run(code).strip() == "[]"


def test_lowrank_and_practice_work_without_torch() -> None:
    code = """
import sys
sys.modules["torch"] = None
from lora_edu import lowrank
from lora_edu.practice import bank, check
from lora_edu.practice.exercises import load
print(check("truncated_svd", lowrank.truncated_svd).passed, len(bank.load()) > 0, "peft_compression" in load())
"""
    assert run(code).strip() == "True True True"


def test_an_unknown_name_says_what_there_is() -> None:
    import lora_edu

    with pytest.raises(AttributeError, match=r"'LoraLinear'; it has .*LoRALinear"):
        lora_edu.LoraLinear  # noqa: B018
    assert all(getattr(lora_edu, name) is not None for name in dir(lora_edu))


def test_every_direct_dependency_is_pinned_where_it_fits_and_bounded_above() -> None:
    pinned = pins()
    for need in NEEDED:
        for pin in pinned[need.name.lower()]:
            (exact,) = pin.specifier
            assert exact.operator == "==" and need.specifier.contains(exact.version), (need, pin)
        assert need.name == "ruff" or any(s.operator == "<" for s in need.specifier), need


def test_the_installed_versions_are_the_tested_ones() -> None:
    for name in ("torch", "peft", "numpy", "nbval", "jupyterlab"):
        fitting = [p for p in pins()[name] if p.marker is None or p.marker.evaluate()]
        if Version(version(name)).public != next(iter(fitting[0].specifier)).version:
            pytest.skip(f"{name} {version(name)} is not the pinned version: a run against other versions")


def test_no_file_of_pins_names_an_index() -> None:
    for name in ("constraints.txt", "environment.yml", "pyproject.toml", "Makefile"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"index-url|find-links|file://", text), name


def test_environment_yml_leaves_the_packages_to_pip() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment.keys() == {"name", "channels", "dependencies"}
    python, pip, packages = environment["dependencies"]
    assert pip == "pip" and packages == {"pip": ["-c constraints.txt", "-e ."]}
    assert python.removeprefix("python=") in PROJECT["requires-python"].split(",")[0]


def test_the_default_run_leaves_the_appendices_to_their_lanes() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    selected = re.findall(r"^-m '(.+?)'", options["addopts"])
    assert [set(s.split(" and ")) for s in selected] == [{f"not {lane}" for lane in APPENDICES.values()}]
    assert {path.name[0] for path in chapters(ROOT / "notebooks" / "appendix")} <= APPENDICES.keys()


def test_the_refresh_leaves_out_an_appendix_whose_library_is_missing(tmp_path: Path) -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in ("import sys, no_such.library", "x = ?")]
    for folder, absent in (("appendix", ["no_such.library"]), ("chapters", [])):
        path = tmp_path / folder / "A_more.ipynb"
        path.parent.mkdir()
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        assert missing(path) == absent


def test_the_refresh_leaves_out_appendix_a_where_its_weights_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "appendix" / "A_more.ipynb"
    path.parent.mkdir()
    setup = nbformat.v4.new_code_cell("from lora_edu.lab import minilm")
    nbformat.write(nbformat.v4.new_notebook(cells=[setup]), path)
    monkeypatch.setenv("LORA_EDU_MINILM", str(tmp_path))
    assert missing(path) == ["sentence-transformers/all-MiniLM-L6-v2"]


def test_the_readme_lists_every_chapter_with_its_minutes_and_nothing_else() -> None:
    rows = re.findall(r"^\| \[(?:\d\d|[AB]) .+?\]\((notebooks/.+?\.ipynb)\) \| .+ \| (\d+) \|", README, re.MULTILINE)
    assert [Path(path).name for path, _ in rows] == [path.name for path in chapters()]
    for path, minutes in rows:
        assert f"Time: {minutes} minutes" in (ROOT / path).read_text(encoding="utf-8")


def test_the_readmes_commands_and_files_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"\bmake ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for link in re.findall(r"\]\(([^)#:\s]+)\)", README):
        assert (ROOT / link).exists(), link
    for extra in set(re.findall(r"\.\[([a-z,]+)\]", README)):
        assert set(extra.split(",")) <= PROJECT["optional-dependencies"].keys()


def test_the_tracked_files_say_nothing_of_a_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in (".png", ".ipynb", ".safetensors") or not path.exists() or path.name == "test_contract.py":
            continue
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/(?:home|root|Users)/\w", text), name
