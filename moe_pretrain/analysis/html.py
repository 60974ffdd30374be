"""The parts of a self-contained HTML page. Text goes in as plain text and is escaped here."""

import html
from collections.abc import Mapping, Sequence

_STYLE = """
body { margin: 0; background: #f3f4f6; color: #1c1f24; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 20px 14px 40px; }
h1 { font-size: 24px; margin: 6px 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 8px; }
p { margin: 0 0 8px; color: #555; }
section { background: #fff; border: 1px solid #e0e2e6; border-radius: 8px; padding: 14px 16px;
  margin-top: 14px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
.single svg { max-width: 740px; margin: 0 auto; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 14px; }
.scroll { overflow-x: auto; }
.scroll svg { min-width: 640px; }
.legend { grid-column: 1 / -1; display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; }
.legend i { display: inline-block; width: 14px; height: 4px; margin: 0 5px 3px 0; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(145px, 1fr)); gap: 10px 16px;
  margin: 0; }
dl div:last-child { grid-column: 1 / -1; }
dt { font-size: 12.5px; color: #666; }
dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-top: 1px solid #eceef1;
  vertical-align: top; white-space: nowrap; }
td:last-child { white-space: normal; min-width: 220px; overflow-wrap: anywhere; }
@media (max-width: 640px) { td:nth-child(2) { white-space: normal; min-width: 96px; overflow-wrap: anywhere; } }
pre { overflow-x: auto; font-size: 12.5px; margin: 10px 0 0; }
.warning { background: #fff4e5; border-color: #e0a050; }
.warning ul { margin: 0; padding-left: 20px; overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 600; }
"""


def section(title: str, body: str, note: str = "") -> str:
    """Return a card: a heading, a line of text under it, and ``body`` as finished HTML."""
    note_html = f"<p>{html.escape(note)}</p>" if note else ""
    return f"<section><h2>{html.escape(title)}</h2>{note_html}{body}</section>"


def facts(values: Mapping[str, str]) -> str:
    """Return labels and values as a grid; the last one gets a line of its own."""
    entries = (
        f"<div><dt>{html.escape(label)}</dt><dd>{html.escape(value)}</dd></div>" for label, value in values.items()
    )
    return f"<dl>{''.join(entries)}</dl>"


def table(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """Return a table that scrolls sideways on a phone; the last column wraps."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in line) + "</tr>" for line in lines)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def warnings(title: str, lines: Sequence[str]) -> str:
    """Return a card that stands out, with one point per line; nothing without lines."""
    points = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f'<section class="warning"><h2>{html.escape(title)}</h2><ul>{points}</ul></section>' if lines else ""


def charts(title: str, svgs: Sequence[str], note: str = "", layout: str = "grid") -> str:
    """Return a card of charts.

    Args:
        title: Heading.
        svgs: SVG elements; with none the card says so.
        note: A line under the heading.
        layout: "grid" for small charts, "single" for one, "scroll" for one that must stay wide.
    """
    if not svgs:
        return section(title, "<p>None recorded.</p>")
    return section(title, f'<div class="{layout}">{"".join(svgs)}</div>', note)


def legend(colors: Mapping[str, str]) -> str:
    """Return the legend that the charts beside it share: label to colour."""
    entries = (
        f'<span><i style="background:{color}"></i>{html.escape(label)}</span>' for label, color in colors.items()
    )
    return f'<div class="legend">{"".join(entries)}</div>'


def folded(title: str, text: str) -> str:
    """Return a card that opens on a click and shows ``text`` as it is."""
    return (
        f"<section><details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details></section>"
    )


def page(title: str, subtitle: str, sections: Sequence[str]) -> str:
    """Return the whole document; it loads nothing."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(subtitle)}</p>" + "\n".join(sections) + "</main></body></html>\n"
    )
