"""What mkdocs calls: tables and pictures of results/ become part of the site."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures and tables of results/ under their own paths."""
    for folder in ("results/figures", "results/tables"):
        for path in sorted((ROOT / folder).iterdir()):
            if path.suffix in (".png", ".pdf", ".csv"):
                source = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, source, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put a table of results/ where `<!-- include results/... -->` says so."""
    included = re.sub(
        r"<!-- include (\S+) -->", lambda found: (ROOT / found[1]).read_text(), markdown
    )
    return included.replace("](../results/", "](results/")
