"""Instructions whose keeping rules can check, under the names and with the arguments of IFEval (arXiv 2311.07911).

Its data are read as they are. Two things differ: sentences are counted by their ends (`.`, `!`, `?`) instead of by a
trained splitter, and `language:response_language` is not checked, which needs a language detector.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from m1jax.errors import UserError

_Rule = Callable[..., bool]
_RULES: dict[str, _Rule] = {}


class Constraint(NamedTuple):
    """One instruction."""

    name: str
    arguments: Mapping[str, Any]
    """of the rule of this name"""


def constraints(names: Sequence[str], arguments: Sequence[Mapping[str, Any] | None]) -> list[Constraint]:
    """Those of a line of IFEval's data, its `instruction_id_list` and `kwargs`; arguments that are null are left out.

    Raises:
        UserError: there is no such rule, or it takes other arguments.
    """
    if len(names) != len(arguments) or not names:
        raise UserError(f"{len(names)} instructions with {len(arguments)} sets of arguments; expected one for each")
    found = []
    for name, given in zip(names, arguments):
        rule = _RULES.get(name)
        if rule is None:
            raise UserError(f"no rule for the instruction {name!r}; there are {', '.join(sorted(_RULES))}")
        kept = {key: value for key, value in (given or {}).items() if value is not None}
        try:
            inspect.signature(rule).bind("", **kept)
        except TypeError as error:
            raise UserError(f"instruction {name!r}: {error}; given are {', '.join(kept) or 'no arguments'}") from error
        try:
            rule("a text, to see whether the arguments will do", **kept)
        except (TypeError, ValueError, AttributeError, re.error) as error:
            raise UserError(f"instruction {name!r} cannot be checked with {kept}: {error}") from error
        found.append(Constraint(name, kept))
    return found


def broken(instructions: Sequence[Constraint], answer: str) -> list[str]:
    """The names of those that an answer does not keep; an empty answer keeps none."""
    if not answer.strip():
        return [instruction.name for instruction in instructions]
    return [name for name, arguments in instructions if not _RULES[name](answer, **arguments)]


def to_json(instructions: Sequence[Constraint]) -> str:
    return json.dumps([instruction._asdict() for instruction in instructions], ensure_ascii=False)


def from_json(text: str) -> list[Constraint]:
    return [Constraint(**fields) for fields in json.loads(text)]


def _rule(name: str) -> Callable[[_Rule], _Rule]:
    def keep(rule: _Rule) -> _Rule:
        _RULES[name] = rule
        return rule

    return keep


def _compare(count: int, relation: str, number: int) -> bool:
    if relation == "less than":
        return count < number
    if relation == "at least":
        return count >= number
    raise ValueError(f"the relation is {relation!r}; expected 'less than' or 'at least'")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’-]\w+)*", text)


def _occurrences(word: str, text: str) -> int:
    """As a word or phrase of its own, in any case."""
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


@_rule("keywords:existence")
def _existence(text: str, keywords: Sequence[str]) -> bool:
    return all(_occurrences(word, text) for word in keywords)


@_rule("keywords:forbidden_words")
def _forbidden(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(_occurrences(word, text) for word in forbidden_words)


@_rule("keywords:frequency")
def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(_occurrences(keyword, text), relation, frequency)


@_rule("keywords:letter_frequency")
def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(text.lower().count(letter.lower()), let_relation, let_frequency)


@_rule("length_constraints:number_words")
def _number_words(text: str, num_words: int, relation: str) -> bool:
    return _compare(len(_words(text)), relation, num_words)


@_rule("length_constraints:number_sentences")
def _number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    ends = re.findall(r"[.!?]+[\"'”’)\]*_]*(?=\s|$)", text.strip())
    unfinished = not re.search(r"[.!?]+[\"'”’)\]*_]*$", text.strip())
    return _compare(len(ends) + unfinished, relation, num_sentences)


@_rule("length_constraints:number_paragraphs")
def _number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Separated by `***`; one in between that is empty spoils it."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    inner = parts[1:-1]
    return all(inner) and len([part for part in parts if part]) == num_paragraphs


@_rule("length_constraints:nth_paragraph_first_word")
def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are separated by empty lines; the word is compared without its punctuation, in any case."""
    paragraphs = [part for part in re.split(r"\n\s*\n", text.strip()) if part.strip()]
    if len(paragraphs) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    words = _words(paragraphs[nth_paragraph - 1])
    return bool(words) and words[0].lower() == first_word.lower()


@_rule("detectable_content:number_placeholders")
def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]]+\]", text)) >= num_placeholders


@_rule("detectable_content:postscript")
def _postscript(text: str, postscript_marker: str) -> bool:
    marker = r"\s*".join(re.escape(letter) for letter in postscript_marker.replace(" ", ""))
    return re.search(rf"^\s*{marker}", text, re.IGNORECASE | re.MULTILINE) is not None


@_rule("detectable_format:number_bullet_lists")
def _bullets(text: str, num_bullets: int) -> bool:
    return len(re.findall(r"^\s*(?:\*(?!\*)|-(?!-))\s*\S", text, re.MULTILINE)) == num_bullets


@_rule("detectable_format:number_highlighted_sections")
def _highlights(text: str, num_highlights: int) -> bool:
    found = re.findall(r"\*\*([^\n*]+)\*\*|\*([^\n*]+)\*", text)
    return sum(bool((strong or light).strip()) for strong, light in found) >= num_highlights


@_rule("detectable_format:multiple_sections")
def _sections(text: str, section_spliter: str, num_sections: int) -> bool:  # IFEval's spelling
    return len(re.findall(rf"^\W*{re.escape(section_spliter.strip())}\s*\d+", text, re.MULTILINE)) >= num_sections


@_rule("detectable_format:title")
def _title(text: str) -> bool:
    return any(title.strip() for title in re.findall(r"<<([^\n<>]+)>>", text))


@_rule("detectable_format:json_format")
def _json(text: str) -> bool:
    inner = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(inner)
    except (ValueError, RecursionError):
        return False
    return True


@_rule("detectable_format:constrained_response")
def _constrained(text: str) -> bool:
    return any(f"My answer is {choice}." in text for choice in ("yes", "no", "maybe"))


@_rule("combination:two_responses")
def _two_responses(text: str) -> bool:
    """Different ones, separated by six asterisks."""
    parts = [part.strip() for part in text.split("******")]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


@_rule("combination:repeat_prompt")
def _repeat(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


@_rule("startend:end_checker")
def _end(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@_rule("startend:quotation")
def _quotation(text: str) -> bool:
    return len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"'


@_rule("change_case:capital_word_frequency")
def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return _compare(sum(word.isupper() for word in _words(text)), capital_relation, capital_frequency)


@_rule("change_case:english_capital")
def _capital(text: str) -> bool:
    return text.isupper()


@_rule("change_case:english_lowercase")
def _lowercase(text: str) -> bool:
    return text.islower()


@_rule("punctuation:no_comma")
def _no_comma(text: str) -> bool:
    return "," not in text
