"""Static HTML pages: templates that escape everything, one script of ours allowed by its hash, no other host."""

from __future__ import annotations

import base64
import hashlib
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

from megatron_t1.report.mathematics import with_formulas


def render(template: str, **values: Any) -> str:
    """The page of a template in megatron_t1/report/templates; what models wrote stays text."""
    environment = Environment(
        loader=PackageLoader("megatron_t1.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "seconds": _seconds, "formulas": with_formulas, "name": _name}
    assert environment.loader is not None
    script, style = (environment.loader.get_source(environment, name)[0] for name in ("report.js", "report.css"))
    html = environment.get_template(template).render(
        **values,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup(style),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    return html.encode("utf-8", "replace").decode()  # a lone surrogate in a data file has no UTF-8


def _name(dotted: str) -> Markup:
    """A setting or metric, which a narrow page may break after a dot or underscore only."""
    return escape(dotted).replace(".", Markup(".<wbr>")).replace("_", Markup("_<wbr>"))


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _seconds(value: float) -> str:
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02d} s"
