"""A reader of HTML for tests: what a page holds, and what is wrong with its form."""

from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input", "source", "col"}
OUTSIDE = ("http:", "https:", "//")


class Page(HTMLParser):
    """Tags, texts and tables of a page; `faults` lists what is not as it should be."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.faults, self.ids, self.links, self.headings = [], [], [], []
        self.images, self.tables, self.texts, self.attributes = [], [], [], []
        self._open = []
        self.feed(text)
        self.close()
        self.faults += [f"<{tag}> is not closed" for tag in self._open]
        self.faults += [f"id {i} twice" for i in set(self.ids) if self.ids.count(i) > 1]
        self.faults += [f"no id {link}" for link in self.links if link not in self.ids]
        self.faults += self._of_headings()

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if len(given) < len(attrs):
            self.faults.append(f"<{tag}> has an attribute twice")
        self.attributes.append((tag, given))
        if tag not in VOID:
            self._open.append(tag)
        if "id" in given:
            self.ids.append(given["id"])
        if given.get("href", "").startswith("#"):
            self.links.append(given["href"][1:])
        for key in ("src", "href", "srcset"):
            if given.get(key, "").startswith(OUTSIDE):
                self.faults.append(f"<{tag}> needs the network: {given[key]}")
        if tag == "script" or any(key.startswith("on") for key in given):
            self.faults.append(f"<{tag}> runs a script")
        if tag == "img":
            self.images.append(given)
            if not given.get("alt"):
                self.faults.append("an <img> has no alt")
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append(int(tag[1]))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "th" and given.get("scope") not in ("col", "row"):
            self.faults.append("a <th> has no scope")

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            self.faults.append(f"</{tag}> closes something else, line {self.getpos()[0]}")

    def handle_data(self, data):
        if self._open and self._open[-1] == "style":
            return
        self.texts.append(data)
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data

    def _of_headings(self):
        if self.headings[:1] != [1] or self.headings.count(1) > 1:
            return ["the page does not begin with its one <h1>"]
        steps = zip(self.headings, self.headings[1:], strict=False)
        return [f"<h{b}> follows <h{a}>" for a, b in steps if b > a + 1]
