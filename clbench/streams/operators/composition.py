"""What is wrong with a list of operators before any data is read: options that contradict each other, and their order."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from clbench.interfaces import UserError
from clbench.streams.operators import registry

DEALS = ("shots", "blur", "repeat", "mnist_360", "bell", "file_lists")  # make experiences of the whole stream's samples
MIXES = (*DEALS, "order", "drift")
JOINS = {"permute": 10, "rotate": 10, "relabel": None}  # show all samples in every experience, unless `experiences` is null


class _Unread:
    """Stands for a stream whose data is not read: operators look at their options first, and stop at it."""

    def __getattr__(self, name: str) -> Any:
        raise _NotRead


class _NotRead(Exception):
    pass


def refused(name: str, options: Mapping[str, Any]) -> str | None:
    """Why one of clbench's operators cannot have these options, whatever the stream; None where that depends on it.

    Others are not asked: naming an operator must not import it.
    """
    if name not in registry.BUILT_IN:
        return None
    module, _, function = registry.BUILT_IN[name].rpartition(".")
    try:
        getattr(importlib.import_module(module), function)(_Unread(), **options)
    except _NotRead:
        return None
    except UserError as error:
        return str(error)
    raise AssertionError(f"operator {name} did not look at its stream")


def misplaced(listed: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
    """A line for each operator that makes no sense after one before it."""
    for k, (later, options) in enumerate(listed):
        for earlier, _ in listed[:k]:
            why = _clash(earlier, later, options)
            if why is not None:
                yield f"operator {later} cannot stand after {earlier}: {why}"
                break


def _clash(earlier: str, later: str, options: Mapping[str, Any]) -> str | None:
    """Why `later` makes no sense after `earlier`."""
    pictures = earlier in ("permute", "rotate", "corrupt")
    whole_experiences = later == "order" and options.get("of") == "experiences"
    if later in MIXES and not whole_experiences:
        if pictures:
            return f"the experiences differ in their pictures by then; put {later} before it"
        if earlier in DEALS and later in (*DEALS, "order"):
            return "both deal the whole stream to experiences"
        if earlier == "relabel" and later != "drift":
            return f"classes mean other things in other experiences by then; put {later} before it"
        if earlier in ("hide_boundaries", "looks"):
            return f"experiences have rules of their own by then; put {later} before it"
        if earlier == "drift":
            return f"it would undo the drift; put {later} before it"
    if earlier in (*MIXES, "shuffle") and earlier != "shots" and _joins(later, options):
        instead = "to: stream" if later == "corrupt" else "experiences: null"
        return f"{later} shows the whole stream in every experience, so that {earlier} has no effect; put {instead}"
    own_order = later in ("shuffle", *MIXES) or (later == "single_pass" and options.get("shuffle", True))
    if earlier == "shuffle" and own_order and not whole_experiences:
        return f"{later} makes an order of its own, so that {earlier} has no effect"
    if earlier == "looks" and later in ("long_tail", "concatenate", "single_pass", "evaluate"):
        return f"looks are places among the samples that there are; put {later} before it" if later != "evaluate" else _BOTH
    if earlier == "evaluate" and later == "looks":
        return _BOTH
    if earlier == "test_time" and (later in MIXES or _joins(later, options)):
        return f"the stream is a source experience and sets to adapt to by then; put {later} before it"
    if earlier == later and later in ("concatenate", "hide_boundaries", "looks", "evaluate", "test_time"):
        return "name all data sets in one" if later == "concatenate" else "it stands there already"
    return None


_BOTH = "looks inside an experience ask for an evaluation after each"


def _joins(name: str, options: Mapping[str, Any]) -> bool:
    if name == "corrupt":
        return options.get("to", "copies") == "copies"
    if name == "rotate" and options.get("angles") is not None and "experiences" not in options:
        return True
    return name in JOINS and options.get("experiences", JOINS[name]) is not None
