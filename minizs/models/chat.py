"""A chat template that prints the day prints the same one throughout a run.

Llama 3.1 and 3.2 ask for a `date_string`. SmolLM3 and Granite call `strftime_now`, a function that
`transformers` gives to every template. After midnight a run would have other prompts."""

from datetime import date

# What templates ask `strftime_now` for. The longer ones come first: %-d holds no %d, but is near.
FORMATS = ("%-d", "%d", "%-m", "%m", "%B", "%b", "%Y", "%y", "%A", "%a", "%j", "%H", "%M", "%S")


def day_in_words(day: date) -> str:
    """The day as Llama's templates print it."""
    return day.strftime("%d %b %Y")


def fix_day(template: str, day: date) -> str:
    """The template with a `strftime_now` of its own, for which it is always the midnight of `day`.

    It is written in the template's language: `transformers` takes no functions as arguments."""
    if "strftime_now" not in template:
        return template
    replacements = "".join(f" | replace('{name}', '{day.strftime(name)}')" for name in FORMATS)
    body = "{{ format" + replacements + " }}"
    return "{%- macro strftime_now(format) -%}" + body + "{%- endmacro -%}" + template
