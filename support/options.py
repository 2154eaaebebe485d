"""Support: types of command-line options, and checks of options; not needed to understand the paper."""

import argparse
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from functools import partial

from support.files import BadInput, is_unicode, nfc


class Parser(argparse.ArgumentParser):
    """An argument parser that keeps its description's lines, and whose errors are BadInput, without the usage."""

    def __init__(self, **options):
        layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=120)
        super().__init__(formatter_class=layout, **options)

    def error(self, message: str) -> None:
        raise BadInput(message)


def _number(kind: type, what: str, low: float, high: float, text: str) -> float:
    """An option's value within [low, high]."""
    with suppress(ValueError):
        if low <= (value := kind(text)) <= high:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} must be a {what} from {low} to {high}")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """The type of an option that takes a whole number within [low, high]."""
    return partial(_number, int, "whole number", low, high)


def real_number(low: float, high: float) -> Callable[[str], float]:
    """The type of an option that takes a number within [low, high]."""
    return partial(_number, float, "number", low, high)


def ratio(text: str) -> Fraction:
    """The type of an option that takes a ratio such as 16:9, from 1:8 to 8:1."""
    with suppress(ValueError, ZeroDivisionError):
        if 1 / 8 <= (value := Fraction(text.replace(":", "/"))) <= 8:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} must be a ratio of width to height from 1:8 to 8:1")


def unicode_text(text: str) -> str:
    """The type of an option that goes into a prompt, such as a category: in NFC, as all categories are spelt."""
    if not is_unicode(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8 text; give it as UTF-8")
    return nfc(text)


def one_for_each(values: list | None, others: list | None, option: str, other: str) -> list:
    """One value of an option for each value of another. Raises BadInput unless the option was given zero times, once,
    or once for each.
    """
    values, count = values or [None], len(others or ())
    if len(values) not in (1, count) or (option.endswith("mask") and values[0] and len(values) != count):
        raise BadInput(f"{option}: {len(values)} given for {count} of {other}; give one for each")
    return values * count if len(values) == 1 else values


def check_together(args: argparse.Namespace, exclusive: list[tuple[str, ...]],
                   needed: list[tuple[str, str]]) -> None:
    """Raises BadInput if two options of a group in `exclusive` are given, or the first of a pair in `needed`
    without the second.
    """
    given = {name: f"--{name.replace('_', '-')}" for name, value in vars(args).items()
             if value is not None and value is not False}
    for group in exclusive:
        if len(some := [given[option] for option in group if option in given]) > 1:
            raise BadInput(f"{some[0]} and {some[1]} exclude each other; leave one out")
    for option, other in needed:
        if option in given and other not in given:
            raise BadInput(f"{given[option]} goes with --{other}; add that one")
