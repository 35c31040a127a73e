from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "numpy", "coreai", "coreai_torch", "coreai_opt", "coremltools", "huggingface_hub")

IMPORTED_AFTER = """
import sys
from coreai_zoo.cli.app import cli
try:
    cli.main(sys.argv[2:], prog_name="zoo")
except SystemExit as stop:
    code = stop.code
heavy = sorted(set(sys.argv[1].split(",")) & set(sys.modules))
print("code", code, "heavy", ",".join(heavy), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["list"], ["list", "--json"], ["show", "qwen3.6-27b"], ["plan", "qwen3.6-27b"], ["doctor"]],
    ids=" ".join,
)
def test_commands_that_only_look_import_no_torch(arguments: list[str]) -> None:
    command = [sys.executable, "-c", IMPORTED_AFTER, ",".join(HEAVY), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)

    assert result.stderr.splitlines()[-1] == "code 0 heavy "


def test_the_driver_above_sees_torch_when_it_is_imported() -> None:
    driver = "import torch\n" + IMPORTED_AFTER
    result = subprocess.run(
        [sys.executable, "-c", driver, "torch,numpy", "list"], capture_output=True, text=True, check=True
    )

    assert "torch" in result.stderr.splitlines()[-1]


# Editable installations, of this and of other checkouts, must be out of sight: a namespace package would be read from
# all of them, in an order that differs from process to process.
LINT_COPY = """
import os, sys
def editable(path):
    return not path or os.path.isdir(f"{path}/coreai_zoo_overlays") or os.path.isdir(f"{path}/overlays")
sys.path[:] = [".", "overlays", *(path for path in sys.path if not editable(path))]
from importlinter.cli import lint_imports_command
lint_imports_command()
"""


def lint_imports(root: Path, cache: Path, *config: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--cache-dir", str(cache), *config],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )


def test_dependencies_point_one_way(root: Path, tmp_path: Path) -> None:
    result = lint_imports(root, tmp_path)

    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("coreai_zoo/errors.py", "import coreai_zoo.overlay", "every import points down"),
        (
            "coreai_zoo/checkpoint/files.py",
            "import coreai_zoo.build.pipeline",
            "every import points down",
        ),
        ("coreai_zoo/brand_new.py", "", "every import points down"),  # in no layer
        ("coreai_zoo/attic/__init__.py", "", "every import points down"),
        ("coreai_zoo/weights/brand_new.py", "from coreai_zoo.build.design import design", "every import points down"),
        (
            "coreai_zoo/signature.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import coreai_zoo.contracts",
            "every import points down",
        ),
        ("coreai_zoo/weights/quantizer.py", "import coreai_opt", "only backends import"),
        ("coreai_zoo/gates/rule.py", "def late():\n    import coreai.runtime", "only backends import"),
        ("coreai_zoo/cli/app.py", "import coreai_zoo_qwen36", "the host imports neither"),
        ("coreai_zoo/weights/plan.py", "import coreai_zoo_overlays.qwen3_5", "the host imports neither"),
        ("overlays/coreai_zoo_overlays/qwen3_5/decoder.py", "import coreai_torch", "overlays and plugins import"),
        (
            "overlays/coreai_zoo_overlays/qwen3_5/brand_new.py",
            "from coreai_zoo.build.design import design",
            "overlays and plugins import",
        ),
        ("coreai_zoo_qwen36/plugin.py", "import coreai_zoo.gates.run", "overlays and plugins import"),
        ("overlays/coreai_zoo_overlays/qwen3_5/decoder.py", "import coreai_zoo_qwen36", "an overlay does not import"),
        (
            "coreai_zoo/backends/coreai/backend.py",
            "import coreai_zoo.backends.coreml.backend",
            "the Core ML backend and",
        ),
        (
            "coreai_zoo/backends/coreml/backend.py",
            "import coreai_zoo.backends.coreai.backend",
            "and the other way round",
        ),
        ("coreai_zoo/entry.py", "import torch", "vocabulary and discovery import no torch"),
    ],
)
def test_each_contract_is_broken_by_what_it_forbids(
    root: Path, tmp_path: Path, file: str, line: str, contract: str
) -> None:
    copy = tmp_path / "copy"
    for source in [*root.glob("coreai_zoo*/**/*.py"), *root.glob("overlays/**/*.py"), root / "pyproject.toml"]:
        target = copy / source.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    (copy / file).parent.mkdir(exist_ok=True)
    with (copy / file).open("a", encoding="utf-8") as module:
        module.write(f"\n{line}\n")
    result = subprocess.run(
        [sys.executable, "-c", LINT_COPY, "--no-logo", "--no-cache"],
        cwd=copy,
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 1, result.stdout + result.stderr
    broken = [text for text in result.stdout.splitlines() if " BROKEN" in text]
    assert any(text.startswith(contract) for text in broken), result.stdout


# Words of one family of models. A plugin knows them, the host does not: where they may stand nevertheless.
FAMILY = re.compile(r"gdn|qwen|moe\.", re.IGNORECASE)
ALLOWED = (
    # Examples below a help text, which have to name an entry or a bundle that there is.
    (r"cli/\w+\.py", r" {8}(zoo|python -m coreai_zoo\.cli\.demo) .*"),
    (r"cli/app\.py", r' {4}epilog="Example: zoo build qwen3\.6-27b --sample",'),
    # A class of tokenizers that engines know by that name, whatever the model.
    (r"backends/builtin\.py", r'.*TokenizerClass\(name\) for name in \("Qwen2Tokenizer", .*'),
)


def family_words(host: Path) -> list[tuple[str, str]]:
    """File and line of every word of a family in what stands below `host`."""
    files = [path for path in sorted(host.rglob("*")) if path.is_file() and path.suffix != ".pyc"]
    return [
        (path.relative_to(host).as_posix(), line)
        for path in files
        for line in (path.name, *path.read_text(encoding="utf-8").splitlines())
        if FAMILY.search(line)
    ]


def test_the_host_knows_no_word_of_a_family_of_models(root: Path) -> None:
    found = family_words(root / "coreai_zoo")
    used = {
        (files, lines): [each for each in found if re.fullmatch(files, each[0]) and re.fullmatch(lines, each[1])]
        for files, lines in ALLOWED
    }
    assert [each for each in found if not any(each in allowed for allowed in used.values())] == []
    assert [allowed for allowed, words in used.items() if not words] == [], "allowed, and not needed any more"


@pytest.mark.parametrize("line", ["ROLES = ('gdn.in',)", "# as in Qwen3-Next", "if role == 'moe.expert':"])
def test_a_word_of_a_family_would_be_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "brand_new.py").write_text(f"{line}\n", encoding="utf-8")
    assert family_words(tmp_path) == [("brand_new.py", line)]
    assert not any(re.fullmatch(files, "brand_new.py") or re.fullmatch(lines, line) for files, lines in ALLOWED)
