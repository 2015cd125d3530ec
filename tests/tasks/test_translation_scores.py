"""Scores of translated lines next to sacreBLEU's own."""

import pytest
from sacrebleu.metrics import BLEU, CHRF

from multimax.data.vocabulary import MosesSubwords
from multimax.tasks.translation import score_lines


@pytest.fixture
def moses(tmp_path):
    (tmp_path / "code").write_text("#version: 0.2\na b\n")
    (tmp_path / "dict.en.txt").write_text("a 1\n")
    return MosesSubwords(tmp_path / "dict.en.txt", tmp_path / "code", "en")


def test_words_that_are_tokenized_on_purpose_are_no_cause_for_a_warning(moses, caplog):
    lines = 100 * ["the ca@@ t sat ."]
    assert score_lines(moses, lines, lines)[0]["tokenized_bleu"] == pytest.approx(100)
    assert not caplog.records


def test_tokenized_bleu_is_of_words_without_smoothing(moses):
    lines = ["the ca@@ t sa@@ t on the mat .", "it &apos;s he@@ re , is n@@ &apos;t it ?"]
    references = ["the cat sat on the m@@ at !", "it &apos;s here , isn &apos;t it ?"]
    metrics, signatures = score_lines(moses, lines, references)
    words = ["the cat sat on the mat .", "it &apos;s here , is n&apos;t it ?"]
    expected = ["the cat sat on the mat !", "it &apos;s here , isn &apos;t it ?"]
    plain = ["the cat sat on the mat.", "it's here, is n't it?"]
    plain_references = ["the cat sat on the mat!", "it's here, isn't it?"]
    tokenized = BLEU(tokenize="none", smooth_method="none", force=True)
    assert metrics == {
        "bleu": BLEU().corpus_score(plain, [plain_references]).score,
        "chrf": CHRF().corpus_score(plain, [plain_references]).score,
        "tokenized_bleu": tokenized.corpus_score(words, [expected]).score,
    }
    assert "tok:none|smooth:none" in signatures["tokenized_bleu"]
    assert score_lines(moses, ["the"], ["the"])[0]["tokenized_bleu"] == 0
