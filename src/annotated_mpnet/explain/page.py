"""Draw an explanation as one HTML file that needs no network: `page.html`, with the data in it.

The page holds the `Explanation` as JSON and draws it; what anything sees was computed in Python.
"""

import html
from importlib import resources

import msgspec

from annotated_mpnet.explain.explanation import Explanation


def page(explanation: Explanation) -> str:
    """Return the page, complete."""
    template = resources.files("annotated_mpnet.explain").joinpath("page.html")
    data = msgspec.json.encode(explanation).decode()
    # In a script only `</script>` and `<!--` mean something to HTML, and both begin with a `<`,
    # which JSON has in texts alone.
    data = data.replace("<", "\\u003c")
    title = html.escape(explanation.sentence)
    # The data last: what it holds is not searched for marks.
    text = template.read_text(encoding="utf-8").replace("<!--TITLE-->", title)
    return text.replace("<!--DATA-->", data)
