"""A command whose options are given once and not empty."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand

from galore_trainer.cli.outcome import interrupted
from galore_trainer.errors import OptionError


class OptionsOnce(TyperCommand):
    """Refuses ``--rank 4 --rank 5``, of which the parser would take the last, and ``--resume ''``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words of a command line.

        Raises:
            OptionError: an option that stands there twice, or whose value is empty.
        """
        values, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in order:
            name = parameter.opts[-1] if parameter.param_type_name == "option" else ""
            if not name or ctx.resilient_parsing:
                continue
            if (count := order.count(parameter)) > 1:
                raise OptionError(name, f"given {count} times", "it once", "Remove all but one.")
            value = values.get(parameter.name)
            if isinstance(value, str) and not value.strip():
                raise OptionError(name, value, "a value", f"Write one after {name}, or leave {name} out.")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; Ctrl-C ends it in one word, whatever the version of the parser makes of it."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(interrupted()) from None
