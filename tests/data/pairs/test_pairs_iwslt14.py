import io
import random
import tarfile
import tracemalloc

import pytest
from subword_nmt.learn_bpe import learn_bpe
from tiny_iwslt14 import TESTS, members, sentences, write_archive

from multimax.data.pairs import build_pair_source
from multimax.data.prepare.iwslt14 import is_clean, prepare, segments, training_text

# Title and description of both talks are text too, as in fairseq.
HEADS = [[f"Speaker{n}: A Talk{n}", f"About Talk{n}"] for n in (1, 2)]


def tokenized(sentence):
    """As Moses does it, for the sentences here."""
    return sentence.lower().replace(".", " .").replace(":", " :")


def lines(path):
    content = path.read_bytes().decode()
    assert content.endswith("\n")
    return content[:-1].split("\n")


def without_bpe(path):
    return [f"{line} ".replace("@@ ", "").rstrip() for line in lines(path)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("iwslt14")
    prepare(write_archive(root / "de-en.tgz", members()), root / "prepared", lambda line: None)
    return root / "prepared"


def test_what_is_written(folder):
    splits = [f"{split}.{x}" for split in ("train", "valid", "test") for x in ("de", "en")]
    assert {p.name for p in folder.iterdir()} == {*splits, "code", "dict.de.txt", "dict.en.txt"}
    assert [p.name for p in folder.parent.iterdir() if p.name.startswith(".")] == []


def test_every_23rd_clean_pair_is_for_validation(folder):
    plain = [s[1] for s in sentences()]
    english = [tokenized(s) for s in (*HEADS[0], *plain[:60], *HEADS[1], *plain[60:])]
    assert without_bpe(folder / "valid.en") == english[22::23]
    assert without_bpe(folder / "train.en") == [
        line for number, line in enumerate(english, 1) if number % 23
    ]
    assert len(lines(folder / "valid.de")) == 5
    assert len(lines(folder / "train.de")) == 119


def test_the_test_split_joins_five_parts_in_fairseqs_order(tmp_path):
    parts = {name: [(f"{name} eins.", f"{name} one.")] for name in reversed(TESTS)}
    prepare(write_archive(tmp_path / "a.tgz", members(tests=parts)), tmp_path / "p", print)
    assert without_bpe(tmp_path / "p" / "test.en") == [f"{n.lower()} one ." for n in TESTS]


def test_the_tokens_are_those_of_moses(tmp_path):
    # From the Perl script: escaped characters, abbreviations of the language, split apostrophes.
    train = [('Herr Dr. Schmidt sagt: "Das kostet 3,5 % z.B. & mehr."', "It's 3.5 <b>, isn't it?")]
    prepare(
        write_archive(tmp_path / "a.tgz", members(train=train + sentences())), tmp_path / "p", print
    )
    assert without_bpe(tmp_path / "p" / "train.de")[0] == "speaker1 : a talk1"
    assert (
        "herr dr. schmidt sagt : &quot; das kostet 3,5 % z.b. &amp; mehr . &quot;"
        in without_bpe(tmp_path / "p" / "train.de")
    )
    assert "it &apos;s 3.5 &lt; b &gt; , isn &apos;t it ?" in without_bpe(tmp_path / "p/train.en")


def test_which_lines_are_text():
    talk = ["<url>u</url>", "<talkid>1</talkid>", "<keywords>k</keywords>", "<title>T</title>",
            "<description>D</description>", " text <title> inside", ""]  # fmt: skip
    assert list(training_text(talk)) == ["T", "D", " text  inside", ""]
    document = ["<doc>", "<title>no</title>", '<seg id="12">  It\u2019s &amp; so  </seg>', "</doc>"]
    assert list(segments(document)) == ["It's &amp; so"]


@pytest.mark.parametrize(
    ("german", "english", "kept"),
    [
        ("a b", "a b c", True),
        ("a b", "a b c d", False),
        ("a b c d", "a b", False),
        (" ".join("a" * 175), " ".join("a" * 175), True),
        (" ".join("a" * 176), " ".join("a" * 175), False),
        ("", "a", False),
        ("a", " ", False),
        ("a", "b" * 1000, True),
        ("a", "b" * 1001, False),
    ],
)
def test_which_pairs_are_clean(german, english, kept):
    assert is_clean(german, english) is kept


def test_what_was_left_out_is_reported(tmp_path):
    bad = [("", "empty"), ("ein", "one two three four"), (" ", " ")]
    said = []
    prepare(
        write_archive(tmp_path / "a.tgz", members(train=bad + sentences())),
        tmp_path / "p",
        said.append,
    )
    # Counted are the pairs that are kept.
    english = [*HEADS[0], *(s[1] for s in sentences()[:58]), *HEADS[1]]
    english += [s[1] for s in sentences()[58:]]
    assert without_bpe(tmp_path / "p" / "valid.en") == [tokenized(s) for s in english[22::23]]
    report = "\n".join(said)
    assert "127 training pairs: 124 kept, 3 left out as empty (2)" in report
    assert "test: 10 pairs" in report


def test_dictionaries_are_fairseqs(folder):
    for language in ("de", "en"):
        entries = [line.split(" ") for line in lines(folder / f"dict.{language}.txt")]
        assert (len(entries) + 4) % 8 == 0
        real = [(word, int(n)) for word, n in entries if not word.startswith("madeupword")]
        words = [word for line in lines(folder / f"train.{language}") for word in line.split()]
        assert dict(real) == {word: words.count(word) for word in words}
        assert real == sorted(real, key=lambda entry: (-entry[1], entry[0]))
        fillers = entries[len(real) :]
        assert fillers == [[f"madeupword{i:04d}", "0"] for i in range(len(fillers))]


def test_merges_are_learned_on_both_sides_of_the_training_split(folder):
    expected = io.StringIO()
    learn_bpe(without_bpe(folder / "train.de") + without_bpe(folder / "train.en"), expected, 10_000)
    assert (folder / "code").read_text() == expected.getvalue()
    assert len(lines(folder / "code")) > 50


def test_only_a_newline_ends_a_line(tmp_path):
    odd = [("Ein\u2028Satz und\rnoch ein\x85Satz.", "A\u2028sentence and another\x85one.")]
    prepare(write_archive(tmp_path / "a.tgz", members(train=odd * 3 + sentences())),
            tmp_path / "p", print)  # fmt: skip
    data = build_pair_source("iwslt14", root=str(tmp_path / "p")).load()
    assert len(data.splits["train"]) + len(data.splits["valid"]) == 127


class TestReading:
    def test_numbers_are_those_of_the_dictionary(self, folder):
        data = build_pair_source("iwslt14", root=str(folder)).load()
        symbols = ["<s>", "<pad>", "</s>", "<unk>"]
        symbols += [line.split(" ")[0] for line in lines(folder / "dict.de.txt")]
        assert data.languages.source_vocabulary.size == len(symbols)
        for i, line in enumerate(lines(folder / "valid.de")):
            tokens = data.splits["valid"].source[i].tolist()
            assert [symbols[t] for t in tokens] == [*line.split(), "</s>"]
        assert data.references["test"] == lines(folder / "test.en")
        assert len(data.splits["test"]) == 10
        assert data.left_out == {"train": {}, "valid": {}, "test": {}}

    def test_the_other_direction(self, folder):
        there, back = (
            build_pair_source("iwslt14", root=str(folder), source=s, target=t)
            for s, t in (("de", "en"), ("en", "de"))
        )
        assert there.languages.source == back.languages.target == "de"
        assert there.load().splits["test"].source[3].tolist() == (
            back.load().splits["test"].target[3].tolist()
        )
        assert there.languages.fingerprint != back.languages.fingerprint

    def test_plain_sentences_become_lines_and_lines_plain_sentences(self, folder):
        vocabulary = build_pair_source("iwslt14", root=str(folder)).languages.source_vocabulary
        line = vocabulary.line("Der Hund kennt, das Haus!")
        assert vocabulary.words(line) == "der hund kennt , das haus !"
        assert vocabulary.plain(line) == "der hund kennt, das haus!"
        test = lines(folder / "test.de")
        assert [vocabulary.line(de) for de, _ in sentences()[:2]] == test[:2]
        tokens = vocabulary.encode(test)[0]
        assert vocabulary.decode(tokens) == test[0]
        assert vocabulary.pieces(tokens) == [*test[0].split(), "</s>"]


def spoil(folder, tmp_path, name, change):
    """A copy of the folder with one file changed."""
    copy = tmp_path / "spoiled"
    copy.mkdir()
    for path in folder.iterdir():
        content = path.read_bytes()
        (copy / path.name).write_bytes(change(content) if path.name == name else content)
    return build_pair_source("iwslt14", root=str(copy))


class TestBadInput:
    def test_no_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"data\.root=null.*prepare.iwslt14"):
            build_pair_source("iwslt14")
        with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder.*prepare.iwslt14"):
            build_pair_source("iwslt14", root=str(tmp_path / "nowhere"))

    @pytest.mark.parametrize("name", ["train.en", "valid.de", "dict.de.txt", "code"])
    def test_a_missing_file(self, folder, tmp_path, name):
        source = spoil(folder, tmp_path, name, lambda content: content)
        (source.root / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            source.load()

    @pytest.mark.parametrize(("name", "short"), [("test.de", "de"), ("test.en", "en")])
    def test_unequal_numbers_of_lines(self, folder, tmp_path, name, short):
        source = spoil(folder, tmp_path, name, lambda c: b"\n".join(c.split(b"\n")[:7]) + b"\n")
        with pytest.raises(ValueError, match=rf"test\.{short} ends at line 7, .* goes on"):
            source.load()

    def test_both_sides_in_one_language(self, folder, tmp_path):
        german = (folder / "train.de").read_bytes()
        source = spoil(folder, tmp_path, "train.en", lambda content: german)
        (source.root / "dict.en.txt").write_bytes((folder / "dict.de.txt").read_bytes())
        with pytest.raises(ValueError, match=r"source equals target in 100% of the train split"):
            source.load()

    def test_text_that_was_not_split_as_the_dictionary(self, folder, tmp_path):
        def detokenized(content):
            return content.replace(b"@@ ", b"").replace(b" .", b".").replace(b"the", b"The")

        source = spoil(folder, tmp_path, "test.en", detokenized)
        with pytest.raises(ValueError, match=r"% of the words in the test split of iwslt14"):
            source.load()

    @pytest.mark.parametrize("name", ["test.de", "test.en"])
    def test_empty_lines_are_left_out_and_counted(self, folder, tmp_path, name):
        def emptied(content):
            rows = content.split(b"\n")
            return b"\n".join([b"", rows[1], b"  ", *rows[3:]])

        data = spoil(folder, tmp_path, name, emptied).load()
        assert data.left_out["test"] == {"with an empty side": 2}
        kept = [line for i, line in enumerate(lines(folder / "test.en")) if i not in (0, 2)]
        assert data.references["test"] == kept
        assert len(data.splits["test"]) == 8

    def test_a_carriage_return_ends_no_line(self, folder, tmp_path):
        def returned(content):
            return content.replace(b" ", b" \r ", 3).replace(b"\n", b"\r\n")

        data = spoil(folder, tmp_path, "test.de", returned).load()
        whole = build_pair_source("iwslt14", root=str(folder)).load()
        assert data.splits["test"].source.tokens.tolist() == (
            whole.splits["test"].source.tokens.tolist()
        )

    def test_long_sentences_are_left_out_of_training_only_and_counted(self, folder):
        sizes = [
            max(len(de.split()), len(en.split())) + 1
            for de, en in zip(lines(folder / "train.de"), lines(folder / "train.en"), strict=True)
        ]
        limit = max(sizes) - 1
        long = sizes.count(max(sizes))
        assert long < len(sizes)
        data = build_pair_source("iwslt14", root=str(folder), max_length=limit).load()
        assert data.left_out["train"] == {f"longer than {limit} tokens": long}
        assert len(data.splits["train"]) == 119 - long
        assert len(data.splits["test"]) == 10
        with pytest.raises(ValueError, match=r"train split of iwslt14 has no .*max_length=2"):
            build_pair_source("iwslt14", root=str(folder), max_length=2).load()

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("dict.de.txt", lambda c: c + b"onlyaword\n", r"dict\.de\.txt is no vocabulary"),
            ("dict.de.txt", lambda c: c + c, r"dict\.de\.txt"),
            ("train.de", lambda c: b"\xff" + c, r"train\.de is not UTF-8"),
        ],
    )
    def test_a_damaged_file(self, folder, tmp_path, name, change, message):
        with pytest.raises(ValueError, match=message):
            spoil(folder, tmp_path, name, change).load()

    def test_codes_of_another_format(self, folder, tmp_path):
        source = spoil(folder, tmp_path, "code", lambda content: b"no merges at all here\n")
        with pytest.raises(ValueError, match="code holds no BPE codes"):
            source.languages.source_vocabulary.line("Der Hund")


class TestBadArchives:
    def attempt(self, tmp_path, content=None, archive=None, message=""):
        archive = archive or write_archive(tmp_path / "de-en.tgz", content)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            prepare(archive, tmp_path / "out", lambda line: None)
        assert [p.name for p in tmp_path.iterdir() if p.name != "de-en.tgz"] == []

    def test_no_archive(self, tmp_path):
        self.attempt(tmp_path, archive=tmp_path / "x.tgz", message=r"x\.tgz: give .* de-en\.tgz")

    def test_a_truncated_archive(self, tmp_path):
        path = write_archive(tmp_path / "de-en.tgz", members())
        whole = path.read_bytes()
        for size in (0, len(whole) // 5, len(whole) // 2, len(whole) * 4 // 5):
            path.write_bytes(whole[:size])
            self.attempt(tmp_path, archive=path, message="is truncated or damaged")

    def test_a_damaged_archive(self, tmp_path):
        path = write_archive(tmp_path / "de-en.tgz", members())
        whole = bytearray(path.read_bytes())
        random.Random(0).shuffle(whole)
        path.write_bytes(bytes(whole))
        self.attempt(tmp_path, archive=path, message="is truncated or damaged")

    def test_a_file_that_unpacks_to_too_much(self, tmp_path, monkeypatch):
        monkeypatch.setattr("multimax.data.prepare.iwslt14.LARGEST", 10)
        self.attempt(tmp_path, members(), message=r"de-en\.tgz would be .* more than the 10 that")

    def test_a_header_that_promises_too_much(self, tmp_path):
        """A name of 100 MB, which tarfile would read whole; the archive itself has 0.1 MB."""
        path = tmp_path / "de-en.tgz"
        with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as archive:
            archive.addfile(tarfile.TarInfo("a" * 10**8))
        tracemalloc.start()
        self.attempt(tmp_path, archive=path, message="part of 100,000,[0-9]+ bytes is more than")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10**8

    def test_a_file_of_it_is_missing(self, tmp_path):
        content = members()
        del content["de-en/IWSLT14.TEDX.dev2012.de-en.en.xml"]
        self.attempt(tmp_path, content, message=r"has no IWSLT14\.TEDX\.dev2012\.de-en\.en\.xml")

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("train.tags.de-en.en", "training talks of the archive have unequal"),
            ("IWSLT14.TED.tst2011.de-en.de.xml", "test3 of the archive have unequal"),
        ],
    )
    def test_unequal_numbers_of_lines(self, tmp_path, name, message):
        content = members()
        rows = content[f"de-en/{name}"]
        content[f"de-en/{name}"] = [row for row in rows if row != rows[5]]
        self.attempt(tmp_path, content, message=message)

    def test_the_folder_exists(self, tmp_path):
        (tmp_path / "p").mkdir()
        with pytest.raises(ValueError, match="p exists: give another folder"):
            prepare(write_archive(tmp_path / "a.tgz", members()), tmp_path / "p")
