"""A parser of pages for tests."""

from html.parser import HTMLParser

VOID = {"meta", "img", "link", "br", "hr", "input", "path", "circle", "use"}


class Page(HTMLParser):
    """Checks that tags are closed in order; keeps texts by section, ids, links and resources."""

    def __init__(self, html):
        super().__init__()
        self.open = []
        self.ids = []
        self.resources = []
        self.links = []
        self.alts = []
        self.texts = {}
        self.section = "head"
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = given["id"] or ""
        self.ids += [given["id"] or ""] if "id" in given else []
        self.resources += [
            given[name] or "" for name in ("src", "srcset", "data", "action") if name in given
        ]
        self.links += [given[name] or "" for name in ("href", "xlink:href") if name in given]
        if tag == "img":
            self.alts.append(given.get("alt"))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts[self.section] = self.texts.get(self.section, "") + data.replace(
            "\N{NO-BREAK SPACE}", " "
        )
