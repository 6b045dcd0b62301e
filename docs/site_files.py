"""Brings the repository's other files into the site, so that a page's links lead to the same files as on disk.

A notebook becomes a page of its own; links to it lead there.

Pages of docs/ stand at the site's root; every other file keeps its path. Only what links lead to is taken.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("CONTRIBUTING.md", "RELEASING.md", "CHANGELOG.md", "results/**/*.md")
LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside docs/, and the files that any page links to."""
    pages = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    linked = {
        path
        for page in [*pages, *(ROOT / "docs").glob("*.md")]
        for path in ((page.parent / link).resolve() for _, link in LINK.findall(page.read_text(encoding="utf-8")))
        if path.is_file() and not path.is_relative_to(ROOT / "docs") and path != ROOT / "README.md"
    }
    for path in [*pages, *sorted(linked - set(pages))]:
        uri = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=notebook_page(path)))
    return files


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: its text, its code and what that printed."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        language = "bash" if source.startswith("%%bash\n") else "python"
        printed = "".join("".join(out.get("text", "")) for out in cell["outputs"])
        parts.append(f"```{language}\n{source.removeprefix('%%bash').strip()}\n```")
        parts += [f"```text\n{printed.rstrip()}\n```"] if printed else []
    return "\n\n".join([*parts, f'<a href="{path.name}">This notebook as a file</a>'])


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Write links for the places that files have in the site."""
    uri = page.file.src_uri
    here = Path(uri) if (ROOT / uri).is_file() else Path("docs", uri)

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here.parent.as_posix(), match[2]))
        target = {"README.md": "index.md"}.get(target, target.removeprefix("docs/"))
        target = re.sub(r"\.ipynb$", ".md", target)
        return match[1] + posixpath.relpath(target, posixpath.dirname(uri) or ".")

    return LINK.sub(moved, markdown)
