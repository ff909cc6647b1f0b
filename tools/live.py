"""Live figures: the page runs the snippet's own graph in the reader's browser.

A fence such as

    ```live name="dot-product/live" caption="What to try."
    def figure(x, temperature):
        _, weights = scaled_dot_product_attention(x, x, x, return_weights=True)
        return {"weights": weights}

    live(figure, x=numbers([[1, 2], [3, 4]]), temperature=slider(0.1, 5, 1.0),
         views=[heatmap("weights")])
    ```

runs after the blocks above it and uses their names: the function calls the snippet, and
is exported with it (export.py). controls.py and views.py have what a fence can use.
What it gives is stored as any figure is, and compared by the tests: NAME.json holds the
graph, NAME.html the figure at its default inputs, which is what a reader without
JavaScript sees. docs/assets/live/ runs the one and draws the other anew. The site takes
the stored ones, so a build needs neither torch nor QuickJS.
"""

import html
import json

from pymdownx.superfences import SuperFencesException

from tools import controls, views
from tools.figures import FOLDER, lead

# What a fence can use, beside live().
TOOLS = (
    controls.slider, controls.choice, controls.toggle, controls.numbers,
    controls.pixels, controls.text, views.heatmap, views.lines, views.bars,
    views.scatter, views.network,
)  # fmt: skip


def draw(program, block) -> dict[str, str]:
    """Run a live figure's code in its page's program: what is stored, by suffix."""
    import torch

    from tools.export import export, pack

    asked: list[tuple] = []

    def live(function, views, state=None, train=None, **controls):
        """Export `function` and show `views` of what it returns.

        `state` ({name: tensor}) makes it a training step: the function takes the state
        and returns it renewed under the same names; `train` says for how many steps,
        and every 0-d output becomes a curve over them.
        """
        for name, control in controls.items():
            control.name = name
        asked.append((function, controls, state or {}, train, views))

    before = torch.get_rng_state()
    program.run(block, {tool.__name__: tool for tool in (*TOOLS, live)})
    if len(asked) != 1:
        raise ValueError("a live block calls live() once")
    function, moved, state, train, shown = asked[0]
    inputs = {name: control.tensor() for name, control in moved.items()}
    graph, outputs = export(function, {**inputs, **state}, program.locate)
    if state:
        outputs |= _train(function, inputs, state, train)
    torch.set_rng_state(before)
    spec = {
        "graph": graph,
        "controls": {name: control.spec() for name, control in moved.items()},
        "views": shown,
        "state": {name: pack(tensor) for name, tensor in state.items()},
        "train": train,
    }
    words = {name: control.words() for name, control in moved.items() if control.slots}
    drawn = "".join(views.draw(view, outputs, words) for view in shown)
    figure = _figure(block.fence.options["name"], moved.values(), train, drawn)
    stored = json.dumps(spec, separators=(",", ":"), sort_keys=True)
    return {".json": stored + "\n", ".html": figure}


def _train(function, inputs, state, steps) -> dict:
    """What a training run at the default inputs ends with, and its curves."""
    import torch

    curves: dict[str, list[float]] = {}
    for _ in range(steps):
        outputs = function(**inputs, **state)
        state = {name: outputs[name].detach() for name in state}
        for name, value in outputs.items():
            if value.dim() == 0:
                curves.setdefault(name, []).append(value.item())
    return outputs | {name: torch.tensor(values) for name, values in curves.items()}


def _figure(name: str, moved, train: int | None, drawn: str) -> str:
    inputs = "".join(control.html() for control in moved)
    if train:
        inputs += (
            '<span class="buttons"><button type="button" data-act="run">Train</button>'
            '<button type="button" data-act="reset">Reset</button>'
            f"<output>{train} of {train} steps</output></span>"
        )
    return (
        f'<live-figure data-name="{name}"><fieldset hidden><legend>Move the inputs'
        f'</legend>{inputs}</fieldset><div class="views">{drawn}</div></live-figure>\n'
    )


def validate(language, inputs, options, attrs, md) -> bool:
    if not inputs.get("name") or not inputs.get("caption"):
        raise SuperFencesException(f"a live figure needs name= and caption=: {inputs}")
    options.update(inputs)
    return True


def fence(source, language, css_class, options, md, **kwargs) -> str:
    """The stored figure at its default inputs, in the page."""
    from tools.blocks import digest

    stored = FOLDER / f"{options['name']}.html"
    if not stored.exists():
        raise SuperFencesException(f"{stored} is not drawn yet: make outputs")
    figure = stored.read_text(encoding="utf-8")
    caption = f"<figcaption>{html.escape(options['caption'])}</figcaption>"
    return (
        f'<figure class="live" data-code="{digest(source)}"{lead(options)}'
        " data-search-exclude>"
        f"{figure}{caption}</figure>"
    )
