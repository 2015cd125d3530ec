"""A small archive in the format of IWSLT14's de-en.tgz."""

import io
import tarfile

TESTS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
ARTICLES = {"Der": "The", "Ein": "A"}
NOUNS = {"Mann": "man", "Hund": "dog", "Baum": "tree", "Tisch": "table", "Vogel": "bird"}
VERBS = {"sieht": "sees", "sucht": "seeks", "kennt": "knows", "nimmt": "takes"}
OBJECTS = {"den Ball": "the ball", "das Haus": "the house", "die Stadt": "the city"}


def sentences():
    """120 pairs of plain sentences; the full stop and the case are for the tokenizer to see."""
    return [
        (f"{article} {noun} {verb} {thing}.", f"{ARTICLES[article]} {NOUNS[noun]} "
         f"{VERBS[verb]} {OBJECTS[thing]}.")
        for article in ARTICLES for noun in NOUNS for verb in VERBS for thing in OBJECTS
    ]  # fmt: skip


def tagged(side, number, lines):
    """A talk as in `train.tags.de-en.*`."""
    return [
        f"<url>http://example.org/talks/{number}</url>",
        f"<keywords>talks, {side}</keywords>",
        f"<talkid>{number}</talkid>",
        f"<title>Speaker{number}: A Talk{number}</title>",
        f"<description>About Talk{number}</description>",
        *lines,
    ]


def xml(lines):
    """A file as `IWSLT14.TED.*.xml`."""
    rows = [f'<seg id="{number}"> {line} </seg>' for number, line in enumerate(lines, 1)]
    head = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        "<mteval>",
        "<doc docid='1'>",
        "<title>x</title>",
    ]
    return [*head, *rows, "</doc>", "</mteval>"]


def members(train=None, tests=None):
    """Content by name in the archive.

    Args:
        train: pairs of lines; None is `sentences()` in two talks.
        tests: pairs of lines by part; None is two sentences of each.
    """
    pairs = sentences() if train is None else train
    half = len(pairs) // 2
    parts = {name: pairs[i : i + 2] for i, name in enumerate(TESTS)} if tests is None else tests
    content = {"de-en/README": ["see the web page"]}
    for side, language in enumerate(("de", "en")):
        talks = [tagged(language, 1, [pair[side] for pair in pairs[:half]]),
                 tagged(language, 2, [pair[side] for pair in pairs[half:]])]  # fmt: skip
        content[f"de-en/train.tags.de-en.{language}"] = talks[0] + talks[1]
        for name, lines in parts.items():
            file = f"de-en/IWSLT14.{name}.de-en.{language}.xml"
            content[file] = xml([pair[side] for pair in lines])
    return content


def write_archive(path, content):
    """A .tgz of lines by name; returns its path."""
    with tarfile.open(path, "w:gz") as archive:
        for name, lines in content.items():
            data = "".join(line + "\n" for line in lines).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path
