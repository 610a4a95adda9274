"""How benchmarks read the option out of an answer: tables of cases, worked out by hand from the published rules."""

from __future__ import annotations

import pytest

from freres_cli.evaluation.readers.letters import (
    read_egoschema,
    read_longvideobench,
    read_mvbench,
    read_nextqa,
    read_video_mme,
)

OPTIONS = ("sit down", "run away", "jump high", "fall", "wave")
CASES = {
    read_mvbench: {
        "B": "B", "(B)": "B", "B. run away": "B", "b. run": "B", "(C) jump": "C", "Best option: (D)": "D", "": "",
        "run away": "", "F": "", "A,B": "A", "B-A": "B", "a man runs (B)": "A", "The answer is B.": "B", "AB": "",
        "E)": "E", "3,000 or (B)": "B", "B.\nrun": "B", "_D_": "D", "the\tC\noption": "C", "3,000(B)": "",
    },
    read_nextqa: {
        "B": "B", "B. run away": "B", "(A) or (C)": "C", "(A) not B ": "A", "A or B or C": "C", "": "", "no": "", "b": "",
        "I think they all run away fast now": "B", "run away": "", "they sit down and then jump high": "C", "'D'": "D",
        "The answer is E.": "E", "I saw TV, so B": "B", "they can only run away": "", "they can all only run away": "B",
        "B.Or D.Or": "B",
    },
    read_egoschema: {
        "B": "B", "(C)": "C", "A. sit": "A", "B or A": "B", "C A C": "A", "": "", "b": "", "they will all run away now": "",
        "they will do this: b. run away": "B", "(E) and D.": "E", "they say: b. run away": "",
    },
    read_longvideobench: {
        "B": "B", "The best answer is C.": "C", "D. A book": "D", "Best answer: C": "C", "": "", "b": "", "Answer: D": "A",
        "none of them": "", "Every one of A": "E", "The correct option is (B)": "B",
    },
    read_video_mme: {
        "B": "B", "The best answer is C.": "C", "Answer: D": "D", "Best answer: C": "B", "E": "", "": "", "b": "",
        "The correct option is (B)": "B", "Option: A": "A", "D. All of them": "D",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("read", "said", "letter"),
    [(read, said, letter) for read, table in CASES.items() for said, letter in table.items()],
)
def test_the_letter_of_an_answer(read, said, letter):
    assert read(said, OPTIONS) == letter
