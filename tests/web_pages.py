"""Pages as text: what they would fetch or run, where their links lead, and what is written on them."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """What a page would fetch or run, and its text."""

    def __init__(self, html: str = "") -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_alone(html: str) -> Page:
    """A page that fetches nothing, and whose links lead to places on itself."""
    page = Page(html)
    assert page.tags.isdisjoint({"link", "img", "iframe", "object", "base"})
    assert "url(" not in html and "@import" not in html
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids), "a link leads out of the page, or nowhere"
    assert len(page.ids) == len(set(page.ids))
    return page
