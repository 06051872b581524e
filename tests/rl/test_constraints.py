"""Each rule with an answer that keeps it and answers that do not; and what is wrong with the data is said."""

import re

import pytest

from m1jax.errors import UserError
from m1jax.rl.rewards import constraints as rules

CASES = {
    "keywords:existence": (
        {"keywords": ["sea", "blue whale"]},
        ["A Blue Whale in the sea."],
        ["seas, blue whales", ""],
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["cat"]}, ["concatenate"], ["The Cat sat."]),
    "keywords:frequency": (
        {"keyword": "so", "frequency": 2, "relation": "at least"},
        ["so and SO"],
        ["so sofa", "also so"],
    ),
    "keywords:letter_frequency": ({"letter": "e", "let_frequency": 3, "let_relation": "less than"}, ["eE"], ["eEe"]),
    "length_constraints:number_words": (
        {"num_words": 3, "relation": "at least"},
        ["It's well-known, yes"],
        ["It's well-known", "- - - -"],
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "less than"},
        ["One. Two at 3.5 kg!", 'He said "No." and went'],
        ["One. Two! Three?", "One. Two. three"],
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2},
        ["One\n***\nTwo", "***\nOne\n***\nTwo"],
        ["One\n\nTwo", "One\n***\n\n***\nTwo"],
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
        ["One\n\n*Weekend*, at last"],
        ["Weekend\n\nOne", "One\n\nTwo\n\nWeekend", "One\n\nweekends"],
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, ["[name] at [place]"], ["[name] at []"]),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, ["Yes.\nP. S. Bye"], ["The lamp.s. is", "Yes."]),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2},
        ["* a\n- b", "Of two:\n  * a\n  * b"],
        ["* a", "**a**\n--"],
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        ["*one* and **two**"],
        ["*one* and ** **", "one*two"],
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\n**SECTION 2**\nb"],
        ["SECTION 1\nin SECTION 2", "SECTION one\nSECTION two"],
    ),
    "detectable_format:title": ({}, ["<<A song>>\nof"], ["<<>>", "<a>"]),
    "detectable_format:json_format": ({}, ['{"a": [1]}', "```json\n[1]\n```"], ["{'a': 1}", "Here: {}"]),
    "detectable_format:constrained_response": ({}, ["My answer is maybe."], ["My answer is perhaps.", "maybe"]),
    "combination:two_responses": ({}, ["a\n******\nb"], ["a******a", "a******", "a******b******c"]),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say why."}, ["say why. Because"], ["Because. Say why."]),
    "startend:end_checker": ({"end_phrase": "The end."}, ['"So. the end."\n'], ["The end. So."]),
    "startend:quotation": ({}, [' "yes" '], ['"yes', '"']),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "less than"},
        ["The NASA man"],
        ["NASA and ESA"],
    ),
    "change_case:english_capital": ({}, ["YES, 3 OF THEM"], ["YEs", "123"]),
    "change_case:english_lowercase": ({}, ["yes, 3"], ["Yes"]),
    "punctuation:no_comma": ({}, ["no; none"], ["one, two"]),
}


@pytest.mark.parametrize("name", CASES)
def test_rules(name):
    arguments, kept, broken = CASES[name]
    instructions = rules.constraints([name], [arguments | {"unused": None}])
    assert rules.from_json(rules.to_json(instructions)) == instructions
    assert [text for text in kept if rules.broken(instructions, text)] == []
    assert [text for text in [*broken, " \n"] if not rules.broken(instructions, text)] == []


def test_every_rule_has_cases():
    assert set(CASES) == set(rules._RULES)
    assert len(CASES) == 24  # IFEval's 25 without the language


def test_several_instructions_are_judged_together():
    instructions = rules.constraints(["punctuation:no_comma", "startend:quotation"], [{}, None])
    assert rules.broken(instructions, '"a, b"') == ["punctuation:no_comma"]
    assert rules.broken(instructions, "a, b") == ["punctuation:no_comma", "startend:quotation"]
    assert rules.broken(instructions, '"a b"') == []


@pytest.mark.parametrize(
    ("names", "arguments", "message"),
    [
        ([], [], "0 instructions with 0 sets of arguments"),
        (["startend:quotation"], [], "1 instructions with 0 sets"),
        (
            ["language:response_language"],
            [{"language": "de"}],
            "no rule for the instruction 'language:response_language'",
        ),
        (["keywords:existence"], [{}], "'keywords:existence': missing a required argument: 'keywords'"),
        (["startend:quotation"], [{"mark": "'"}], "unexpected keyword argument 'mark'; given are mark"),
        (["keywords:existence"], [{"keywords": 3}], "cannot be checked with {'keywords': 3}"),
        (
            ["length_constraints:number_words"],
            [{"num_words": 3, "relation": "about"}],
            "the relation is 'about'; expected 'less than' or 'at least'",
        ),
    ],
)
def test_what_is_wrong_is_said(names, arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        rules.constraints(names, arguments)
