"""A report's parts as HTML: every element, and no text that could become one."""

from __future__ import annotations

from html.parser import HTMLParser

from galore_trainer.run.report.pages import Bullets, Code, Heading, Plot, Table, Text, to_html

RISKY = "a <b> & \"c\" 'd' {{ e }} {% f %} &amp;"
BLOCKS = [
    Heading(RISKY),
    Text(RISKY),
    Bullets(["one", RISKY]),
    Table(["", "n", "word", RISKY], [["r 1", "1", RISKY, "-2.5"], ["r 2", "2", "x", "3"], ["r 3", "failed: <x>"]]),
    Plot("name", RISKY, '<svg id="s"><path d="M0"/></svg>', b""),
    Code("a < b\n  c\n\n"),
    Code(f"{RISKY}\n", "Folded & closed"),
]


class Outline(HTMLParser):
    """Tags with attributes, and texts, in the order of the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.parts: list[object] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.parts.append((tag, dict(attrs)) if attrs else tag)

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.parts.append(["pre", data] if self.parts[-1] == "pre" else [data])


def test_a_page_holds_every_part_and_escapes_every_text() -> None:
    page = to_html(RISKY, BLOCKS)
    assert page.startswith('<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n')
    assert page.endswith("</details>\n</body>\n</html>\n")
    assert "<h2>a &lt;b&gt; &amp; \"c\" 'd' {{ e }} {% f %} &amp;amp;</h2>" in page
    assert 'aria-label="a &lt;b&gt; &amp; &#34;c&#34; &#39;d&#39;' in page
    parts = Outline(page).parts
    assert parts[: parts.index("style")] == [
        ("html", {"lang": "en"}),
        "head",
        ("meta", {"charset": "utf-8"}),
        ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        "title",
        [RISKY],
    ]
    word, rest = {"class": "text"}, {"class": "rest", "colspan": "3"}
    assert parts[parts.index("body") :] == [
        "body",
        "h1",
        [RISKY],
        "h2",
        [RISKY],
        "p",
        [RISKY],
        "ul",
        "li",
        ["one"],
        "li",
        [RISKY],
        ("div", {"class": "table"}),
        "table",
        "thead",
        "tr",
        "th",
        "th",
        ["n"],
        ("th", word),
        ["word"],
        "th",
        [RISKY],
        "tbody",
        "tr",
        "td",
        ["r 1"],
        "td",
        ["1"],
        ("td", word),
        [RISKY],
        "td",
        ["-2.5"],
        "tr",
        "td",
        ["r 2"],
        "td",
        ["2"],
        ("td", word),
        ["x"],
        "td",
        ["3"],
        "tr",
        "td",
        ["r 3"],
        ("td", rest),
        ["failed: <x>"],
        ("figure", {"role": "img", "aria-label": RISKY}),
        ("svg", {"id": "s"}),
        ("path", {"d": "M0"}),
        "pre",
        ["pre", "a < b\n  c"],
        "details",
        "summary",
        ["Folded & closed"],
        "pre",
        ["pre", RISKY],
    ]
