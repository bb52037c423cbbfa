"""A chat template that prints the day prints the same one throughout a run.

Llama 3.1 and 3.2 ask for a `date_string`. SmolLM3 and Granite call `strftime_now`, a function that
`transformers` gives to every template. After midnight a run would have other prompts."""

from datetime import date

# What templates can ask `strftime_now` for. With a hyphen a number has no zero before it.
DIRECTIVES = (
    *("%-d", "%-m", "%-H", "%-I", "%-M", "%-S", "%-y", "%-j"),
    *("%d", "%e", "%m", "%B", "%b", "%h", "%Y", "%y", "%C", "%G", "%g", "%A", "%a", "%u", "%w"),
    *("%j", "%U", "%V", "%W", "%H", "%I", "%M", "%S", "%f", "%p"),
    *("%F", "%D", "%T", "%R", "%x", "%X", "%c"),
)


def day_in_words(day: date) -> str:
    """The day as Llama's templates print it."""
    return day.strftime("%d %b %Y")


def fix_day(template: str, day: date) -> str:
    """The template with a `strftime_now` of its own, for which it is always the midnight of `day`.

    It is written in the template's language: `transformers` takes no functions as arguments."""
    if "strftime_now" not in template:
        return template
    replacements = [f" | replace('{name}', '{_printed(day, name)}')" for name in DIRECTIVES]
    body = "{{ format" + "".join(replacements) + " }}"
    return "{%- macro strftime_now(format) -%}" + body + "{%- endmacro -%}" + template


def _printed(day: date, directive: str) -> str:
    if "-" not in directive:
        return day.strftime(directive)
    number = day.strftime(directive.replace("-", ""))  # Windows knows no hyphen
    return number.lstrip("0") or "0"
