"""Paragraphs, lists, headings and chapters of a text, and the pauses after them."""

from __future__ import annotations

import pytest

from chatterbox_turbo.text import PAUSES, pieces, split


@pytest.mark.parametrize(
    ("text", "boundaries"),
    [
        ("One sentence here. Another sentence there.", ["sentence", "end"]),
        ("First paragraph here.\n\nSecond paragraph there.", ["paragraph", "end"]),
        ("First paragraph here.\r\n\r\nSecond paragraph there.", ["paragraph", "end"]),
        ("Before the break.\n\n* * *\n\nAfter the break.", ["chapter", "end"]),
        ("Some words before.\n\nCHAPTER II\n\nSome words after.", ["chapter", "chapter", "end"]),
        ("Roses are red, my love\nViolets are blue, my dear", ["sentence", "end"]),
        ("他今天早上走了。\n她昨天晚上来了。", ["paragraph", "end"]),
    ],
)
def test_pauses_by_what_a_piece_ends_at(text, boundaries):
    found = split(text, target=1.0, longest=5.0, shortest=0.1)
    assert [piece.boundary for piece in found] == boundaries
    assert [piece.pause for piece in found[:-1]] == [PAUSES[name] for name in boundaries[:-1]]
    longer = split(text, target=1.0, longest=5.0, shortest=0.1, pauses={boundaries[0]: 2.5})
    assert longer[0].pause == 2.5 and longer[-1].pause == 0.0


def test_lines_that_were_wrapped_are_one_paragraph():
    wrapped = (
        "It was a bright cold day in April, and the clocks were striking\nthirteen. He slipped quickly through the\n"
        "glass doors of the mansion.\n"
    )
    line = " ".join(wrapped.split())
    first = wrapped.replace("through the\n", "through the very\n")
    assert {piece.paragraph for piece in split(first)} == {0}
    assert " ".join(piece.text for piece in split(wrapped)) == line
    chinese = "今天天气很好我们一起去公园散步然后回家吃饭看书\n睡觉明天再去上学。"
    assert split(chinese)[0].text == chinese.replace("\n", ""), "no space between characters of a wrapped line"


def test_lines_that_their_author_ended_are_no_wrapped_ones():
    text = "Here is one line of a block of lines which is a good deal longer than the others.\nA short one.\nOne more."
    found = split(text, shortest=0)  # the longest line may have been wrapped
    assert [piece.paragraph for piece in found] == [0, 1] and found[1].text == "One more."


def test_a_text_without_empty_lines_is_read_in_blocks():
    read = 0

    def lines():
        nonlocal read
        for _ in range(1000):
            read += 1
            yield "This is the only line of a paragraph, and no empty line comes after it anywhere in here.\n"

    next(pieces(lines(), "en"))
    assert read < 300


def test_short_answers_are_put_together_but_not_across_chapters():
    text = '"Yes."\n\n"No."\n\n"Why?"\n\nCHAPTER 2\n\nNo.'
    found = split(text, "en")
    assert [piece.text for piece in found] == ['"Yes." "No." "Why?"', "CHAPTER 2", "No."]
    assert [piece.chapter for piece in found] == [0, 1, 1] and found[1].heading
    assert len(split(text, "en", shortest=0)) == 5


@pytest.mark.parametrize(
    "line",
    [
        "Chapter 1", "CHAPTER IV.", "Chapter One: The Boy", "chapter the first", "# Title", "## The Sea", "Kapitel 3",
        "Chapitre II", "Capítulo 7", "Глава 5", "第一章", "第12章 海", "제3장", "الفصل الأول", "PROLOGUE", "Epilog",
        "CHAPTER I. DOWN THE RABBIT-HOLE.", "CHAPTER I. Down the Rabbit-Hole", "Chapter Ten The Sea",
        "Part Two", "BOOK III", "บทที่ 4", "序章",
    ],
)  # fmt: skip
def test_chapters(line):
    found = split(f"Before it there are words.\n\n{line}\n\nAfter it there are words.")
    assert [piece.chapter for piece in found] == [0, 1, 1]
    assert [piece.heading for piece in found] == [False, True, False]
    assert found[1].text == line.lstrip("# ")
    follows = split(f"{line}\nAfter it there are words, on the very next line of the text, and so on.")
    assert follows[0].heading and follows[0].text == line.lstrip("# ") and len(follows) == 2


@pytest.mark.parametrize(
    "line",
    ["Chapter one was long and nobody liked what it said about the chapter that came after it, or the one before.",
     "Chapter 3 ........ 45", "Part of it is gone.", "#hashtag", "Partly", "The Chapter 1",
     "Chapter 2 was long.", "Part two is gone", "Book I liked it.", "Chapter 3. It was long and dull.", "Chapter"],
)  # fmt: skip
def test_no_chapters(line):
    assert not any(piece.heading for piece in split(f"Words before.\n\n{line}\n\nWords after."))


def test_lists_dialogues_and_marks_before_a_heading():
    text = "\ufeff# Title\n\nThere are three:\n\n- one item\n- two items\n* three\n\n– ¿Qué?\n— Nada.\n\nFin"
    found = split(text)
    assert [piece.text for piece in found] == ["Title", "There are three: one item. two items. three. ¿Qué? Nada. Fin"]
    assert found[0].heading and (found[0].start, found[-1].end) == (0, len(text))
    apart = split(text, shortest=0)
    assert [piece.text for piece in apart[2:]] == ["one item", "two items", "three", "¿Qué?", "Nada.", "Fin"]
    assert [piece.boundary for piece in apart[2:4]] == ["sentence", "sentence"], "items of a list"
    long = "- " + "one item of a list that is long " * 2 + "\n- " + "another item of it that is long " * 2
    assert not any("-" in piece.text for piece in split(long)), "an item is no wrapped line"
    assert [piece.text for piece in split("标题\n\n他走了。", shortest=1.0)] == ["标题。他走了。"]


def test_underlined_titles_and_deeper_headings():
    found = split("Title\n=====\n\nWords one.\n\n### Deep\n\nWords two.")
    assert [(piece.text, piece.heading, piece.chapter) for piece in found] == [
        ("Title", True, 1), ("Words one.", False, 1), ("Deep", True, 1), ("Words two.", False, 1),
    ]  # fmt: skip
