"""What the command's options take besides words and numbers."""

import click


class Numbers(click.ParamType):
    """Whole numbers separated by commas."""

    name = "N,N,..."

    def convert(self, value, param, ctx):
        try:
            return [int(part) for part in value.split(",")]
        except ValueError:
            return self.fail(f"'{value}' is not a list of whole numbers separated by commas", param, ctx)


class Size(click.ParamType):
    """An image size in pixels."""

    name = "S or HxW"

    def convert(self, value, param, ctx):
        sides = value.lower().split("x")
        if len(sides) not in (1, 2) or not all(side.isascii() and side.isdecimal() and int(side) for side in sides):
            self.fail(f"'{value}' is not a size: give pixels as S or HEIGHTxWIDTH", param, ctx)
        return int(sides[0]), int(sides[-1])


class Fractions(click.ParamType):
    """Numbers separated by commas."""

    name = "X,X,..."

    def convert(self, value, param, ctx):
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            return self.fail(f"'{value}' is not a list of numbers separated by commas", param, ctx)
