"""The text every Python carries: clean, without repeats, and the same each time."""

import inspect

import pytest

from rabit_jax.data import embedded
from rabit_jax.data.embedded import embedded_documents
from rabit_jax.data.sources import DataConfig, documents


def plain(text):
    return "".join(filter(str.isalnum, text.lower()))


def test_embedded_is_a_corpus_of_english():
    texts = embedded_documents()
    joined = " ".join(texts).lower().split()
    assert sum(map(len, texts)) > 1_000_000
    assert all(len(text) >= 200 for text in texts)
    assert joined.count("the") > len(joined) / 30  # English prose: 4 to 7 %
    assert not any(line.startswith(">>>") for text in texts for line in text.splitlines())


def test_embedded_is_the_same_when_gathered_again():
    first = embedded_documents()
    embedded._corpus.cache_clear()
    assert embedded_documents() == first


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_evaluation_paragraphs_are_not_in_training(seed):
    train, held = documents(DataConfig(seed=seed))
    known = {plain(part) for text in train for part in text.split("\n\n") if len(part) > 200}
    leaked = [p for text in held for p in text.split("\n\n") if len(p) > 200 and plain(p) in known]
    assert len(known) > 100 and sum(map(len, held)) > 20_000
    assert leaked == []


def test_no_run_of_thirty_words_is_shared_by_two_documents():
    seen, shared, total = {}, 0, 0
    for number, text in enumerate(embedded_documents()):
        words = text.lower().split()
        for start in range(0, len(words) - 30):
            run = hash(tuple(words[start : start + 30]))
            shared += seen.setdefault(run, number) != number
            total += 1
    assert total > 100_000
    assert shared < 0.002 * total


SOURCE = '''
"""The first line of the module is here."""
def outer():
    """The outer function is described here."""
    if True:
        class Inner:
            """The inner class is described here."""
    try:
        pass
    except ValueError:
        def late():
            """The late function is described here."""
"not a docstring of anything at all"
'''


def test_docstrings_are_found_in_source_order(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    parts = embedded._docstrings(path).split("\n\n")
    assert [part.split()[1] for part in parts] == ["first", "outer", "inner", "late"]


@pytest.mark.parametrize("text", ["def broken(:", "x = '\0'"])
def test_a_source_that_does_not_parse_gives_nothing(tmp_path, text):
    path = tmp_path / "module.py"
    path.write_text(text)
    assert embedded._docstrings(path) == ""


def test_cleaning_keeps_prose_and_drops_code():
    text = inspect.cleandoc(
        """
        A line that is long enough to have been wrapped by its author
        goes   on here.
        * a short point that is long enough for its author to wrap
        * another of the points

        ***************

        Used like this:
        >>> f(1, 2)
        3

        x[1] += {y: (z ** 2) % 7, w: 0}; <a|b> & 0xff
        """
    )
    assert embedded._paragraphs(text) == [
        "A line that is long enough to have been wrapped by its author goes on here.\n"
        "* a short point that is long enough for its author to wrap\n* another of the points",
        "Used like this:",
    ]


@pytest.mark.parametrize(
    ("text", "english"),
    [
        ("Return the value that was set last.", True),
        ("Base exception.", True),
        ("exception", False),
        ("for (x in [1, 2]) { y[x] = {a: z(0)} } or {}, of (9, 9)", False),
        ("return_stmt ::= the word return and then an expression list", False),
        ("Le texte n'est pas en anglais et ne doit donc rester nulle part", False),
        ("Ici, on peut lire ceci et cela mais rien ne doit rester de tout ce texte", False),
    ],
)
def test_what_counts_as_english(text, english):
    assert embedded._is_english(text) == english


def test_a_nearly_repeated_paragraph_is_left_out():
    long = "The quick brown fox jumps over the lazy dog and then it sleeps under the old tree."
    near = long.replace("tree", "bridge")
    other = "Nothing in this sentence has been said in the other one, which makes it new. " * 3
    kept = list(embedded._unrepeated([[long * 3], [near * 3], [other]]))
    assert kept == [long * 3, other]
