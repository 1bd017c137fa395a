"""Rows of a table: checked against a template, and divided. What is wrong with them is told with column and row."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from .errors import DataError
from .markup import as_text, shorten
from .templates import Template

Row = dict[str, Any]


# --- checking -------------------------------------------------------------------------------------------------------


def clean(
    rows: Sequence[Mapping[str, Any]],
    template: Template,
    where: str,
    references: str | None = None,
    group_by: str | None = None,
) -> list[Row]:
    """Rows with every cell as text (`references`: a list of texts), checked against the template. Raises DataError."""
    needed = list(dict.fromkeys([*template.fields, *template.target_fields, references, group_by]))
    for name in needed:
        _check_column(rows, name, where)
    found = [{str(key): _cell(value, key == references) for key, value in row.items()} for row in rows]
    _check_unicode(found, [*template.fields, *template.target_fields], where)
    if template.fields:
        empty = [not any(row[name].strip() for name in template.fields) for row in found]
        _refuse(empty, where, f"no text in {shorten(template.fields)}")
    _check_targets(found, template, where)
    if references is not None:
        _refuse([not row[references] for row in found], where, f"no reference text in {references}")
    return found


def _check_column(rows: Sequence[Mapping[str, Any]], name: str | None, where: str) -> None:
    if name is None:
        return
    missing = [number for number, row in enumerate(rows, 1) if name not in row]
    if not missing:
        return
    there = shorten([str(key) for key in rows[missing[0] - 1]])
    if len(missing) == len(rows):
        raise DataError(f"{where} has no column '{name}'; it has {there}")
    raise DataError(f"{where}: row {missing[0]} has no column '{name}'; it has {there}")


def _refuse(wrong: Sequence[bool], where: str, have: str) -> None:
    if any(wrong):
        first = wrong.index(True) + 1
        told = f"{sum(wrong)} rows have {have} (first: row {first})" if sum(wrong) > 1 else f"row {first} has {have}"
        raise DataError(f"{where}: {told}; remove or mend")


def _check_unicode(rows: Sequence[Row], names: Sequence[str], where: str) -> None:
    for number, row in enumerate(rows, 1):
        for name in names:
            if not isinstance(row[name], str) or row[name].isascii():
                continue
            try:
                row[name].encode()
            except UnicodeEncodeError as error:
                raise DataError(f"{where}: row {number} holds half of a surrogate pair in '{name}'; mend it") from error


def _check_targets(rows: Sequence[Row], template: Template, where: str) -> None:
    label = template.label_field
    if label is None:
        _refuse([not template.render_target(row).strip() for row in rows], where, "an empty answer")
        return
    known = set(template.classes)
    wrong = [number for number, row in enumerate(rows, 1) if row[label] not in known]
    if wrong:
        more = f" (and {len(wrong) - 1} more rows)" if len(wrong) > 1 else ""
        raise DataError(
            f"{where}: label '{rows[wrong[0] - 1][label]}' of row {wrong[0]}{more} is not in labels "
            f"({shorten(template.classes)}); add it to labels or mend the rows"
        )


def _cell(value: Any, is_references: bool) -> Any:
    if is_references:
        if isinstance(value, str) and value.startswith("["):  # a list, as a csv file has to write it
            with suppress(ValueError):
                value = json.loads(value)
        texts = [as_text(item) for item in (value if isinstance(value, (list, tuple)) else [value])]
        return [text for text in texts if text.strip()]
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return as_text(value)


# --- dividing -------------------------------------------------------------------------------------------------------


def wanted_shares(shares: Sequence[float], validation: bool, test: bool) -> tuple[float, float, float]:
    """Shares of the splits that are to be carved, the others being 0."""
    right = len(shares) == 3 and all(0 <= share <= 1 for share in shares) and shares[0] > 0
    if not right or not 0.999 < sum(shares) < 1.001:
        raise DataError(f"shares are three numbers (train, validation, test) that sum to 1, found {list(shares)}")
    kept = (shares[0], shares[1] if validation else 0.0, shares[2] if test else 0.0)
    return kept[0] / sum(kept), kept[1] / sum(kept), kept[2] / sum(kept)


def carve(
    rows: Sequence[Row],
    template: Template,
    shares: Sequence[float],
    seed: int,
    stratify: bool = True,
    group_by: str | None = None,
) -> list[list[Row]]:
    """Rows divided by `shares` at random by `seed`, each part in file order.

    Rows with the same input, or with the same value of `group_by`, go to one part. With `stratify` every class is
    divided in these shares as far as groups allow; its first group goes to the first part, so that no class is unseen.
    """
    units: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        same = tuple(row[name] for name in template.fields) or index
        group = row[group_by] if group_by else ""
        units.setdefault(group if group.strip() else same, []).append(index)  # no group: one of its own
    strata: dict[str, list[list[int]]] = {}
    label = template.label_field if stratify else None
    for members in units.values():
        classes = Counter(rows[i][label] if label else "" for i in members)
        strata.setdefault(classes.most_common(1)[0][0], []).append(members)
    parts: list[list[int]] = [[] for _ in shares]
    generator, seen = random.Random(seed), 0
    for key in sorted(strata):
        generator.shuffle(strata[key])
        for number, members in enumerate(strata[key]):
            # Where most is lacking of all rows so far: as a class comes in one run, this divides each class evenly too.
            seen += len(members)
            lack = [share * seen - len(part) for share, part in zip(shares, parts)]
            parts[lack.index(max(lack)) if number or not label else 0].extend(members)
    return [[rows[i] for i in sorted(part)] for part in parts]
