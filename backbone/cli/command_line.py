"""Commands made from dataclasses: their options, with panels and `--help`, and `--config FILE`.

    @command(app, Settings)
    def train(requested: dict[str, Any]) -> None: ...

`requested` holds the values that the user gave, by field name, and nothing else. If no default depends on the model,
the function gets the finished settings:

    @settled_command(app, SampleOptions)
    def sample(options: SampleOptions) -> None: ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from backbone.cli.help import LazyCommand
from backbone.cli.options import Field, can_be_on, hyphenate, list_fields, list_switches, name_switch
from backbone.cli.values.build import build
from backbone.cli.values.collect import join_values, values_from_file, values_from_flags
from backbone.cli.values.effects import refuse_idle
from backbone.io.console import UserError
from backbone.io.written import written_path

# Characters of choices that are shown behind an option's name; longer ones go into its help
SHORT_CHOICES = 48
CONFIG_HELP = "Settings from a file: .yaml, .toml or .json; flags win over it."
RUNS_CONFIG_HELP = "Settings from a file: .yaml, .toml or .json, or a run's settings.json; flags win over it."


def command(
    app: typer.Typer, declared: type, *others: type, panels: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command of the app, with the options of these dataclasses and `--config FILE`.

    The function gets the values given for the first dataclass, by field name, and instances of the others. `panels` is
    the order of the sections in `--help`. The command raises `UserError` for values that do not fit.
    """

    def call(function: Callable[..., None], requested: dict[str, Any]) -> None:
        first_values, *other_values = (
            {name: value for name, value in requested.items() if name in list_fields(kind)}
            for kind in (declared, *others)
        )
        function(first_values, *(kind(**values) for kind, values in zip(others, other_values, strict=True)))

    def find_fields() -> dict[str, Field]:
        return {name: field for kind in (declared, *others) for name, field in list_fields(kind).items()}

    return _register(app, find_fields, panels, call, _make_parameters)


def settled_command(
    app: typer.Typer, declared: type, *, panels: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command that gets an instance of this dataclass.

    The command raises `UserError` for values that do not fit, are missing, or have no effect beside the others.
    """

    def call(function: Callable[..., None], requested: dict[str, Any]) -> None:
        for field in list_fields(declared).values():
            if field.default is MISSING and field.name not in requested:
                name = field.option.metavar if field.option.argument else field.flag
                raise UserError(f"{name} is missing. Give it: {field.option.help}")
        settings = build(declared, requested)
        refuse_idle(settings, requested)
        function(settings)

    def find_fields() -> dict[str, Field]:
        """The fields that the class itself declares first, then those that it inherits."""
        fields = list_fields(declared)
        names = [
            name for kind in declared.__mro__ for name in inspect.get_annotations(kind) if name in fields
        ]
        return {name: fields[name] for name in names}

    return _register(app, find_fields, panels, call, _make_settled_parameters)


def _register(
    app: typer.Typer,
    find_fields: Callable[[], Mapping[str, Field]],
    panels: Sequence[str],
    call: Callable[[Callable[..., None], dict[str, Any]], None],
    make_parameters: Callable[[Sequence[Field]], list[inspect.Parameter]],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that makes a function a command with these fields, which are looked up when the command runs.

    `call` calls the function with the requested values; `make_parameters` turns the fields into typer's parameters.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        def build_command() -> Callable[..., None]:
            fields = find_fields()

            def run(config: str | None = None, **parsed: Any) -> None:
                requested = values_from_flags(parsed, fields)
                if config is not None:
                    requested = {**values_from_file(written_path(config), fields, requested), **requested}
                call(function, join_values(requested, parsed, fields))

            run.__name__ = function.__name__
            run.remedies = {  # type: ignore[attr-defined]
                field.name: field.option.several for field in fields.values() if field.option.several
            }
            run.__signature__ = inspect.Signature(make_parameters(_sort_by_panel(fields, panels)))  # type: ignore[attr-defined]
            return run

        def placeholder() -> None: ...

        placeholder.__doc__, placeholder.__name__ = function.__doc__, function.__name__
        settings = {"token_normalize_func": hyphenate}
        app.command(cls=cast(Any, partial(LazyCommand, build_command)), context_settings=settings)(
            placeholder
        )
        return function

    return register


def _sort_by_panel(fields: Mapping[str, Field], panels: Sequence[str]) -> list[Field]:
    """Positional arguments first, then options in the panels' order, the required ones at the top of each."""
    order = {panel: position for position, panel in enumerate(panels)}

    def sort_key(field: Field) -> tuple[bool, int, bool]:
        is_required = field.default is MISSING
        return not field.option.argument, order.get(field.option.panel, len(order)), not is_required

    return sorted(fields.values(), key=sort_key)


def _make_parameters(fields: Sequence[Field], config_help: str = RUNS_CONFIG_HELP) -> list[inspect.Parameter]:
    """Typer's parameters: one for every field, one for every switch, and `--config`."""
    parameters = [_make_parameter(field.name, *_make_option(field)) for field in fields]
    for field in fields:
        for switch in list_switches(field):
            info = typer.Option(
                "--" + hyphenate(switch),
                help=_write_switch(field, field.option.switches.get(switch, False)),
                rich_help_panel=field.option.panel,
                hidden=True,
            )
            parameters.append(_make_parameter(name_switch(field, switch), bool | None, info))
        for flag, text in field.option.joined.items():
            info = typer.Option("--" + flag, help=text, metavar="FILE", rich_help_panel=field.option.panel)
            parameters.append(_make_parameter(name_switch(field, flag), str | None, info))
    config_option = typer.Option("--config", help=config_help, metavar="FILE", rich_help_panel="Output")
    return [*parameters, _make_parameter("config", str | None, config_option)]


def _write_switch(field: Field, value: Any) -> str:
    """The option with this value, as on the command line."""
    if isinstance(value, bool):
        return field.flag if value else f"--no-{field.flag[2:]}"
    return f"{field.flag} {value}"


def _make_settled_parameters(fields: Sequence[Field]) -> list[inspect.Parameter]:
    """Typer's parameters. Fields without a default are required: typer checks arguments, and `call` options."""
    parameters = {parameter.name: parameter for parameter in _make_parameters(fields, CONFIG_HELP)}
    for field in fields:
        if field.default is MISSING and field.option.argument:
            hint, info = get_args(parameters[field.name].annotation)
            plain = next(part for part in get_args(hint) if part is not type(None))
            parameters[field.name] = parameters[field.name].replace(
                default=inspect.Parameter.empty, annotation=Annotated[plain, info]
            )
        elif field.default is MISSING:
            parameters[field.name].annotation.__metadata__[0].help += " [required]"
    return list(parameters.values())


def _make_parameter(name: str, hint: Any, info: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=None, annotation=Annotated[hint, info])


def _make_option(field: Field) -> tuple[Any, Any]:
    """The type of a field for typer, which only splits the command line, and its typer.Option or typer.Argument."""
    option = field.option
    text = _describe(field)
    if option.argument:
        info = typer.Argument(help=text, metavar=option.metavar, show_default=False)
        return (list[str] | None if field.many else str | None), info
    names = [field.flag, *("--" + hyphenate(name) for name in option.aliases)]
    metavar = option.metavar or ("NAME" if _has_many_choices(field) else "|".join(option.choices))
    settings: dict[str, Any] = {
        "help": text, "rich_help_panel": option.panel, "hidden": option.hidden, "show_default": False,
    }  # fmt: skip
    if field.kind is bool:
        flag_pair = f"{field.flag}/--no-{field.flag[2:]}"
        return bool | None, typer.Option(
            flag_pair if can_be_on(field) else field.flag, *names[1:], **settings
        )
    settings["metavar"] = metavar or {int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(field.kind, "TEXT")
    if option.choices:
        settings["autocompletion"] = lambda incomplete: [
            word for word in option.choices if word.startswith(incomplete)
        ]
    return (list[str] | None if field.many else str | None), typer.Option(*names, **settings)


def _describe(field: Field) -> str:
    """An option's help text, with its choices if they are many, and its default if it has one."""
    option, default = field.option, field.default
    default_text = option.default_text or ("by model" if option.by_model else "on" if default is True else "")
    if not default_text and not isinstance(default, bool) and default not in (MISSING, None, "", ()):
        values = default if field.many else (default,)
        default_text = ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    text = f"{option.help} One of {', '.join(option.choices)}." if _has_many_choices(field) else option.help
    return f"{text} [default: {default_text}]" if default_text else text


def _has_many_choices(field: Field) -> bool:
    return len("|".join(field.option.choices)) > SHORT_CHOICES and not field.option.metavar
