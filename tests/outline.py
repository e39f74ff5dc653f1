"""What stands on a page."""

from __future__ import annotations

from html.parser import HTMLParser


class Outline(HTMLParser):
    """Tags, ids and references of a page; unbalanced tags are an error."""

    VOID = frozenset({"meta", "link", "input", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.used: list[str] = []
        self.targets: list[str] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self._open.append(tag)
        for name, value in attrs:
            words = (value or "").split()
            self.ids += words if name == "id" else []
            self.used += words if name == "aria-labelledby" else []
            self.targets += words if name in ("src", "href", "xlink:href") else []

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self._open.pop()
