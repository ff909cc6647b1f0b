"""The code of live figures (docs/assets/live/), asked from Python: QuickJS runs it."""

import json
from pathlib import Path

LIVE = Path(__file__).resolve().parent.parent / "docs/assets/live"


def javascript(file: str, expression: str, *arguments):
    """The value of an expression in a module; it is called with arguments, if any."""
    import quickjs  # a build of the site does without

    code, context = (LIVE / file).read_text(encoding="utf-8"), quickjs.Context()
    call = f"({', '.join(map(json.dumps, arguments))})" if arguments else ""
    context.module(f"{code}\nglobalThis.found = JSON.stringify({expression}{call})")
    return json.loads(context.get("found"))
