"""Write the text of `zoo gate --corpus builtin` again, with its licence, from the Python that runs this script.

    python3.11 scripts/make_corpus.py coreai_zoo/gates/corpus_text

The text is prose and code in turn: topics of the Python language reference, which the standard library carries in
`pydoc_data.topics`, and modules of that library. Short documents come first, so that the first few thousand tokens
hold some of both. The committed files are those of CPython 3.11.7; another version writes another text.
"""

from __future__ import annotations

import hashlib
import platform
import pydoc_data.topics
import sys
import sysconfig
from pathlib import Path

# A topic and the module that follows it.
DOCUMENTS = (
    ("with", "bisect"),
    ("raise", "fnmatch"),
    ("execmodel", "textwrap"),
    ("comparisons", "shlex"),
    ("assignment", "string"),
)


def main() -> None:
    """Write text and licence to the folder that was named, and print the text's digest."""
    folder, library = Path(sys.argv[1]), Path(sysconfig.get_paths()["stdlib"])
    parts = []
    for topic, module in DOCUMENTS:
        parts += [pydoc_data.topics.topics[topic], (library / f"{module}.py").read_text(encoding="utf-8")]
    text = "\n\n".join(part.strip("\n") for part in parts) + "\n"
    (folder / "builtin.txt").write_text(text, encoding="utf-8")
    licence = (library / "LICENSE.txt").read_text(encoding="utf-8")
    (folder / "LICENSE.txt").write_text(licence, encoding="utf-8")
    print(f"CPython {platform.python_version()}, {len(text):,} characters")
    print(hashlib.sha256(text.encode()).hexdigest())


if __name__ == "__main__":
    main()
