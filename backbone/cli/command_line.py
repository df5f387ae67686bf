"""Commands of dataclasses: their options, with panels and `--help`, and `--config FILE`.

    @command(app, Settings)
    def train(asked: dict[str, Any]) -> None: ...

`asked` holds the values that the user gave, by field name, and nothing else. Where no default depends on the model, the
function gets the finished settings:

    @settled_command(app, SampleOptions)
    def sample(asked: SampleOptions) -> None: ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from backbone.cli.help import ReadLater
from backbone.cli.options import Field, can_be_on, fields_of, hyphenate, name_switch, switches_of
from backbone.cli.values.build import build
from backbone.cli.values.effects import refuse_idle
from backbone.cli.values.given import join_values, values_from_file, values_from_flags
from backbone.io.console import UserError
from backbone.io.written import written_path

SHORT_CHOICES = 48  # characters of choices that stand behind an option's name; more are listed in its text
CONFIG_HELP = "Settings from a file: .yaml, .toml or .json; flags win over it."
RUNS_CONFIG_HELP = "Settings from a file: .yaml, .toml or .json, or a run's settings.json; flags win over it."


def command(
    app: typer.Typer, declared: type, *others: type, panels: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command of the app, with the options of these dataclasses and `--config FILE`.

    The function gets the values given for the first one's fields, as a dictionary, and instances of the others.
    `panels` is the order of the sections in `--help`. Raises `UserError`, when called, for values that do not fit.
    """

    def called(function: Callable[..., None], asked: dict[str, Any]) -> None:
        own, *more = (
            {name: value for name, value in asked.items() if name in fields_of(each)}
            for each in (declared, *others)
        )
        function(own, *(each(**values) for each, values in zip(others, more, strict=True)))

    def known() -> dict[str, Field]:
        return {name: one for each in (declared, *others) for name, one in fields_of(each).items()}

    return _register(app, known, panels, called, _parameters)


def settled_command(
    app: typer.Typer, declared: type, *, panels: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command that gets an instance of this dataclass.

    Raises `UserError`, when called, for values that do not fit, are missing, or have no effect beside the others.
    """

    def called(function: Callable[..., None], asked: dict[str, Any]) -> None:
        for one in fields_of(declared).values():
            if one.default is MISSING and one.name not in asked:
                name = one.option.metavar if one.option.argument else one.flag
                raise UserError(f"{name} is missing. Give it: {one.option.help}")
        settings = build(declared, asked)
        refuse_idle(settings, asked)
        function(settings)

    def known() -> dict[str, Field]:
        """The command's own options, before those that it shares with others."""
        fields = fields_of(declared)
        own = [name for each in declared.__mro__ for name in inspect.get_annotations(each) if name in fields]
        return {name: fields[name] for name in own}

    return _register(app, known, panels, called, _settled_parameters)


def _register(
    app: typer.Typer,
    fields: Callable[[], Mapping[str, Field]],
    panels: Sequence[str],
    called: Callable[[Callable[..., None], dict[str, Any]], None],
    parameters: Callable[[Sequence[Field]], list[inspect.Parameter]],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that makes a function a command with these fields, which are looked up when it is called.

    `called` hands it what was asked of them; `parameters` makes of them what typer reads.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        def read() -> Callable[..., None]:
            known = fields()

            def run(config: str | None = None, **given: Any) -> None:
                asked = values_from_flags(given, known)
                if config is not None:
                    asked = {**values_from_file(written_path(config), known, asked), **asked}
                called(function, join_values(asked, given, known))

            run.__name__ = function.__name__
            run.__signature__ = inspect.Signature(parameters(_in_panels(known, panels)))  # type: ignore[attr-defined]
            return run

        def named() -> None: ...

        named.__doc__, named.__name__ = function.__doc__, function.__name__
        settings = {"token_normalize_func": hyphenate}
        app.command(cls=cast(Any, partial(ReadLater, read)), context_settings=settings)(named)
        return function

    return register


def _in_panels(known: Mapping[str, Field], panels: Sequence[str]) -> list[Field]:
    """Positional arguments first, then options in the panels' order, the required ones at the top of each."""
    order = {panel: place for place, panel in enumerate(panels)}

    def place(one: Field) -> tuple[bool, int, bool]:
        needed = one.default is MISSING
        return not one.option.argument, order.get(one.option.panel, len(order)), not needed

    return sorted(known.values(), key=place)


def _parameters(fields: Sequence[Field], config_help: str = RUNS_CONFIG_HELP) -> list[inspect.Parameter]:
    """What typer reads: a parameter for every field, one for every switch, and `--config`."""
    parameters = [_parameter(one.name, *_type_field(one)) for one in fields]
    for one in fields:
        for switch in switches_of(one):
            info = typer.Option(
                "--" + hyphenate(switch), help=one.option.help, rich_help_panel=one.option.panel, hidden=True
            )
            parameters.append(_parameter(name_switch(one, switch), bool | None, info))
        for flag, text in one.option.joined.items():
            info = typer.Option("--" + flag, help=text, metavar="FILE", rich_help_panel=one.option.panel)
            parameters.append(_parameter(name_switch(one, flag), str | None, info))
    help_of = typer.Option("--config", help=config_help, metavar="FILE", rich_help_panel="Output")
    return [*parameters, _parameter("config", str | None, help_of)]


def _settled_parameters(fields: Sequence[Field]) -> list[inspect.Parameter]:
    """The same, where what has no default is required: a plain word as such, an option here or in a file."""
    parameters = {one.name: one for one in _parameters(fields, CONFIG_HELP)}
    for one in fields:
        if one.default is MISSING and one.option.argument:
            hint, info = get_args(parameters[one.name].annotation)
            plain = next(part for part in get_args(hint) if part is not type(None))
            parameters[one.name] = parameters[one.name].replace(
                default=inspect.Parameter.empty, annotation=Annotated[plain, info]
            )
        elif one.default is MISSING:
            parameters[one.name].annotation.__metadata__[0].help += " [required]"
    return list(parameters.values())


def _parameter(name: str, hint: Any, info: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=None, annotation=Annotated[hint, info])


def _type_field(one: Field) -> tuple[Any, Any]:
    """A field's type for typer, which only splits the command line, and its typer.Option."""
    option = one.option
    text = _describe(one)
    if option.argument:
        info = typer.Argument(help=text, metavar=option.metavar, show_default=False)
        return (list[str] | None if one.many else str | None), info
    names = [one.flag, *("--" + hyphenate(name) for name in option.aliases)]
    takes = option.metavar or ("NAME" if _many_choices(one) else "|".join(option.choices))
    about: dict[str, Any] = {
        "help": text, "rich_help_panel": option.panel, "hidden": option.hidden, "show_default": False,
    }  # fmt: skip
    if one.kind is bool:
        both = f"{one.flag}/--no-{one.flag[2:]}"
        return bool | None, typer.Option(both if can_be_on(one) else one.flag, *names[1:], **about)
    about["metavar"] = takes or {int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(one.kind, "TEXT")
    if option.choices:
        about["autocompletion"] = lambda incomplete: [
            word for word in option.choices if word.startswith(incomplete)
        ]
    return (list[str] | None if one.many else str | None), typer.Option(*names, **about)


def _describe(one: Field) -> str:
    """An option's help, with its choices where they are many, and its default where it has one."""
    option, default = one.option, one.default
    said = option.default_text or ("by model" if option.by_model else "")
    if not said and not isinstance(default, bool) and default not in (MISSING, None, "", ()):
        values = default if one.many else (default,)
        said = ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    text = f"{option.help} One of {', '.join(option.choices)}." if _many_choices(one) else option.help
    return f"{text} [default: {said}]" if said else text


def _many_choices(one: Field) -> bool:
    return len("|".join(one.option.choices)) > SHORT_CHOICES and not one.option.metavar
