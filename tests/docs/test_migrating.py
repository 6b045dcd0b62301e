"""docs/migrating.md shows what ``galore-ft config convert`` prints."""

from __future__ import annotations

import pytest

import conversions
from blocks import read_block
from galore_trainer.cli.main import main


@pytest.mark.parametrize(("block", "file"), conversions.FILES.items())
def test_a_page_shows_a_file_and_what_the_command_prints(
    block: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "convert", str(conversions.PEERS / file)]) == 0
    printed, _ = capsys.readouterr()
    shown = read_block(conversions.ROOT / "docs" / "migrating.md", block)
    assert shown == conversions.converted(block), "run `make figures`"
    assert f"```yaml\n{printed}```" in shown
    assert f"```yaml\n{(conversions.PEERS / file).read_text()}```" in shown
