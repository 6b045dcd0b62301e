"""README is one page; ``tests/docs`` runs its snippets and commands, ``test_documents.py`` follows its links."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short_and_shows_two_plots() -> None:
    assert len(README.encode()) <= 9000
    assert len(re.findall(r"^!\[[^]]+\]\(docs/images/\w+\.svg\)$", README, re.M)) == 2


def test_it_begins_with_the_two_commands_and_names_every_page() -> None:
    first = re.findall(r"^```bash\n(.*?)^```", README, re.S | re.M)[0]
    assert re.findall(r"^make (\w+)", first, re.M) == ["demo", "test"]
    listed = set(re.findall(r"\]\(docs/([\w-]+\.md)\)", README))
    reached_from_another = {"index.md", "bad-inputs.md", "faults.md"}
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - listed == reached_from_another
