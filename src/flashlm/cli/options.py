"""Options that several verbs take, each said once, and the way to take a group of them as one object.

A command that has a parameter whose type is one of these dataclasses gets an option for each of its fields, in that place
of its `--help`; what it is called with is the object.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from flashlm.planner.choices import Activations, CheckChoice, ExpertPolicyChoice, Mode

if TYPE_CHECKING:
    from flashlm.planner.settings import Asked

PackArgument = Annotated[Path, typer.Argument(help="Folder made by `flashlm convert`.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DramOption = Annotated[
    str | None,
    typer.Option(
        help="Bound on the whole process, like 6GiB. Default: FLASHLM_DRAM, else what is free, less a margin.",
        show_default=False,
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option(help="Tokens that the KV cache may hold, of all sequences and beams together.", show_default=False),
]


ActivationsOption = Annotated[
    Activations | None,
    typer.Option(
        help="int8: tokens are rounded to 8 bits for their products with encoded weights; faster, and not exact."
        " Default: exact.",
        show_default=False,
    ),
]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How to load a pack: the settings that a command line takes."""

    dram: DramOption = None
    mode: Annotated[
        Mode, typer.Option(help="auto: what suits the pack; sparse only where a calibration met its budget.")
    ] = "auto"
    context: ContextOption = None
    plan: Annotated[Path | None, typer.Option(help="File that `flashlm plan --save` wrote.", show_default=False)] = None
    expert_policy: Annotated[
        ExpertPolicyChoice,
        typer.Option(
            help="What the cache of a pack of experts keeps; the text is the same with each. auto: what `flashlm"
            " calibrate` found best, else lru."
        ),
    ] = "auto"
    check: Annotated[
        CheckChoice | None,
        typer.Option(
            help="What is held against checksums: load, what is read while loading (the default; FLASHLM_CHECK); all,"
            " what is streamed later too; none.",
            show_default=False,
        ),
    ] = None

    activations: ActivationsOption = None

    def asked(self) -> Asked:
        """Return what `make_settings` takes; `auto` leaves the mode to a plan and the environment."""
        return {
            "dram": self.dram,
            "mode": None if self.mode == "auto" else self.mode,
            "context": self.context,
            "plan": self.plan,
            "expert_policy": self.expert_policy,
            "check": self.check,
            "activations": self.activations,
        }


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Return `function` as a command in which each parameter that is a dataclass stands for one option per field."""
    signature = inspect.signature(function, eval_str=True)
    groups: dict[str, type] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        group: type = parameter.annotation
        if not dataclasses.is_dataclass(group):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = group
        hints = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(
                each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=hints[each.name]
            )
            for each in dataclasses.fields(group)
        ]

    @wraps(function)
    def command(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{each.name: given.pop(each.name) for each in dataclasses.fields(group)})
        function(**given)

    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    del command.__wrapped__  # typer would read its signature
    return command
