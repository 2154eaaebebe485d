"""Support: the identifiers of categories, which never change once given; not needed to understand the paper."""

from support.checkpoints import read_header
from support.datasets import Item, categories_of, read_identifiers
from support.files import BadInput
from support.models import categories_file
from support.settings import Settings


def category_identifiers(items: list[Item], settings: Settings, template: str) -> dict[str, str]:
    """The identifier [D] of each category, by name (section 3.2). Categories that the frozen CG, --init-control or the
    resumed run knows keep theirs; new ones get the next numbers. template: the default of --identifier. Raises BadInput
    if the frozen CG lacks a category, or if --identifier contradicts the known ones.
    """
    names, known, source = categories_of(items), {}, settings.folder
    if settings.stage == "pg":
        known = read_identifiers(categories_file(settings.cg))
        if unknown := [name for name in names if name not in known]:
            raise BadInput(f"{settings.data}: category {unknown[0]} was not in CG's training set; train CG on this "
                           f"data first (train.py cg; --init-control {settings.cg} starts from this CG)")
        return known
    if settings.resume:
        known = read_header(settings.folder).get("identifiers") or {}
    elif settings.init_control and (source := categories_file(settings.init_control)).is_file():
        known = read_identifiers(source)
    if settings.identifier and known != number_categories([*known], settings.identifier):
        raise BadInput(f"--identifier {settings.identifier}: {source} has other identifiers, such as "
                       f"{[*known.values()][-1]!r}; leave it out, and new categories get the next numbers")
    return number_categories(names, settings.identifier or template_of(known) or template, known)


def number_categories(names: list[str], template: str, known: dict[str, str] | None = None) -> dict[str, str]:
    """`known` in its order; then, for each other name, the template with the next number in place of {}."""
    identifiers = dict(known or {})
    number = len(identifiers)
    for name in names:
        if name not in identifiers:
            while template.replace("{}", str(number)) in identifiers.values():  # if someone has edited the file
                number += 1
            identifiers[name] = template.replace("{}", str(number))
    return identifiers


def template_of(known: dict[str, str]) -> str | None:
    """The template of these identifiers, inferred from the last one and its number; None if it can't be."""
    if not known:
        return None
    before, number, after = [*known.values()][-1].rpartition(str(len(known) - 1))
    return before + "{}" + after if number else None
