// Live figures. The controls give the inputs, the snippet's own graph computes, and what
// was drawn when the site was built (tools/live.py) is moved in place.

const FRAME = { width: 420, height: 230, left: 46, right: 12, top: 12, bottom: 40 };

const number = (value, digits = 2) => {
  const text = value.toFixed(digits);
  return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
};

const place = (value, [low, high], start, end) =>
  start + ((Math.min(Math.max(value, low), high) - low) / (high - low)) * (end - start);
const x = (value, o) => place(value, o.xlim, FRAME.left, FRAME.width - FRAME.right);
const y = (value, o) => place(value, o.ylim, FRAME.height - FRAME.bottom, FRAME.top);

const wordsOf = (element) => element.querySelector("input").value.split(/\s+/).filter(Boolean);

const READ = {
  slider: (element) => {
    const input = element.querySelector("input");
    element.querySelector(".value").textContent = input.value;
    return { shape: [], dtype: "float32", data: Float32Array.of(input.valueAsNumber) };
  },
  toggle: (element) => ({
    shape: [], dtype: "bool", data: Uint8Array.of(element.querySelector("input").checked),
  }),
  choice: (element) => ({
    shape: [], dtype: "int64", data: Float64Array.of(element.querySelector("select").selectedIndex),
  }),
  text: (element, { slots, vocabulary }) => {
    const data = new Float64Array(slots).fill(-1);
    wordsOf(element).slice(0, slots).forEach((word, n) => {
      const at = vocabulary.indexOf(word.toLowerCase()); // as in tools/live.py
      data[n] = at < 0 ? vocabulary.length : at;
    });
    return { shape: [slots], dtype: "int64", data };
  },
  numbers: (element) => {
    const rows = [...element.rows];
    const inputs = [...element.querySelectorAll("input")];
    // An emptied field counts as 0, as does a pixel that is off.
    const data = Float32Array.from(inputs, (input) => (input.checked ? 1 : input.valueAsNumber || 0));
    return { shape: [rows.length, rows[0].cells.length], dtype: "float32", data };
  },
};

function fill(table, tensor, offset, o, hidden, words, marked) {
  const [count, width] = tensor.shape.slice(-2);
  const labels = (given) => (typeof given === "string" ? words[given] : null);
  const rows = labels(o.rows), columns = labels(o.columns);
  if (columns) {
    [...table.tHead.rows[0].cells].slice(1).forEach((cell, j) => {
      cell.textContent = columns[j] ?? "";
      cell.hidden = columns[j] === undefined;
    });
  }
  for (let i = 0; i < count; i++) {
    const row = table.tBodies[0].rows[i];
    const first = row.cells.length - width;
    if (rows) {
      row.cells[0].textContent = rows[i] ?? "";
      row.hidden = rows[i] === undefined;
    }
    for (let j = 0; j < width; j++) {
      const cell = row.cells[first + j];
      const at = offset + i * width + j;
      const value = tensor.data[at];
      const off = hidden && hidden.data[at % hidden.data.length];
      cell.textContent = off ? "·" : number(value, o.digits);
      cell.classList.toggle("negative", !off && value < 0);
      if (marked) cell.setAttribute("aria-current", !!marked.data[at % marked.data.length]);
      if (off) cell.style.removeProperty("--v");
      else cell.style.setProperty("--v", Math.min(1, Math.abs(value) / o.top).toFixed(2));
      if (columns) cell.hidden = columns[j] === undefined;
    }
  }
}

const describe = (label, values) =>
  `${label}: from ${number(values[0])} to ${number(values.at(-1))}, ` +
  `lowest ${number(Math.min(...values))}, highest ${number(Math.max(...values))}.`;

const say = (element, text) => element.querySelector("svg").setAttribute("aria-label", text);

const SHOW = {
  heatmap(element, o, outputs, words) {
    const tensor = outputs[o.output];
    const tables = element.querySelectorAll("table");
    const size = tensor.data.length / tables.length;
    tables.forEach((table, n) => fill(table, tensor, n * size, o, outputs[o.hidden], words, outputs[o.marked]));
  },
  lines(element, o, outputs) {
    const said = Object.entries(o.series).map(([label, name], n) => {
      const values = [...outputs[name].data];
      const points = values.map((v, k) => `${x(o.x[k], o).toFixed(1)},${y(v, o).toFixed(1)}`);
      element.querySelector(`polyline.s${n + 1}`).setAttribute("points", points.join(" "));
      return values.length ? describe(label, values) : `${label}: no values.`;
    });
    say(element, said.join(" "));
  },
  bars(element, o, outputs) {
    const values = [...outputs[o.output].data];
    const zero = y(Math.max(o.ylim[0], 0), o);
    element.querySelectorAll("rect").forEach((bar, n) => {
      bar.setAttribute("y", Math.min(y(values[n], o), zero));
      bar.setAttribute("height", Math.abs(zero - y(values[n], o)));
    });
    say(element, values.map((v, n) => `${o.labels[n]} ${number(v)}`).join(", ") + ".");
  },
  scatter(element, o, outputs) {
    const { data } = outputs[o.output];
    const ring = element.querySelector("ellipse");
    if (ring) {
      const [radius] = outputs[o.ring].data;
      ring.setAttribute("rx", x(radius, o) - x(0, o));
      ring.setAttribute("ry", y(0, o) - y(radius, o));
    }
    const said = [...element.querySelectorAll("svg > g:not(.axes)")].map((point, n) => {
      const [a, b] = [data[2 * n], data[2 * n + 1]];
      point.setAttribute("transform", `translate(${x(a, o)} ${y(b, o)})`);
      const tail = point.querySelector("line");
      tail?.setAttribute("x2", x(0, o) - x(a, o));
      tail?.setAttribute("y2", y(0, o) - y(b, o));
      return `${o.labels?.[n] ?? ""} at ${number(a)}, ${number(b)}`.trim();
    });
    say(element, said.join("; ") + ".");
  },
  network(element, o, outputs, words) {
    const { shape: [left, right], data } = outputs[o.output];
    const name = (given, n) => (typeof given === "string" ? words[given][n] : given[n]) ?? "";
    element.querySelectorAll("line").forEach((line, n) =>
      line.setAttribute("stroke-width", (6 * data[n]).toFixed(1)));
    const texts = element.querySelectorAll("text");
    const said = [];
    for (let i = 0; i < left; i++) {
      const row = [...data.slice(i * right, (i + 1) * right)];
      const best = row.indexOf(Math.max(...row));
      texts[i].textContent = name(o.left, i);
      said.push(`${name(o.left, i)} mostly to ${name(o.right, best)}, ${number(row[best])}`);
    }
    for (let j = 0; j < right; j++) texts[left + j].textContent = name(o.right, j);
    say(element, said.join("; ") + ".");
  },
};

class LiveFigure extends HTMLElement {
  connectedCallback() {
    this.near = new IntersectionObserver((entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      this.near.disconnect();
      this.start();
    }, { rootMargin: "800px" });
    this.near.observe(this);
  }

  disconnectedCallback() {
    this.near.disconnect();
    this.running = false;
  }

  async start() {
    const url = new URL(`../figures/${this.dataset.name}.json`, import.meta.url);
    const [{ load, unpack }, spec] = await Promise.all([
      import("./executor.js"),
      fetch(url).then((response) => response.json()),
    ]);
    this.graph = load(spec.graph);
    this.spec = spec;
    this.initial = () =>
      Object.fromEntries(Object.entries(spec.state).map(([name, t]) => [name, unpack(t)]));
    this.inputs = [...this.querySelectorAll("[data-input]")].map((element) => ({
      element,
      name: element.dataset.input,
      kind: element.dataset.kind,
      options: JSON.parse(element.dataset.options),
    }));
    this.views = [...this.querySelectorAll("[data-view]")].map((element) => ({
      element,
      o: JSON.parse(element.dataset.view),
    }));
    const fieldset = this.querySelector("fieldset");
    fieldset.hidden = false;
    fieldset.addEventListener("input", () => (spec.train ? this.reset() : this.update()));
    this.addEventListener("click", ({ target }) => {
      if (target.dataset.act === "run") this.running ? this.stop() : this.run();
      if (target.dataset.act === "reset") this.reset();
    });
    if (!spec.train) this.update();
    this.dataset.ready = "";
  }

  read() {
    const given = {};
    this.words = {};
    for (const { element, name, kind, options } of this.inputs) {
      given[name] = READ[kind](element, options);
      if (kind === "text") this.words[name] = wordsOf(element).slice(0, options.slots);
    }
    return given;
  }

  update() {
    this.show(this.graph.run(this.read()).outputs);
  }

  show(outputs) {
    for (const { element, o } of this.views) SHOW[o.kind](element, o, outputs, this.words);
  }

  reset() {
    this.stop();
    this.state = null;
    this.run(1);
  }

  stop() {
    this.running = false;
    this.querySelector("[data-act=run]").textContent = "Train";
  }

  // A few steps a frame, so that the reader sees the curve grow and the page stays quick.
  run(limit = Infinity) {
    const { train } = this.spec;
    if (!this.state || this.done >= train) {
      [this.state, this.curves, this.done] = [this.initial(), {}, 0];
    }
    this.running = true;
    this.querySelector("[data-act=run]").textContent = "Stop";
    const inputs = this.read();
    const frame = () => {
      if (!this.running) return;
      const until = performance.now() + 8;
      let outputs;
      do {
        ({ outputs } = this.graph.run({ ...inputs, ...this.state }));
        for (const name in this.state) this.state[name] = outputs[name];
        for (const [name, { shape, data }] of Object.entries(outputs)) {
          if (!shape.length) (this.curves[name] ??= []).push(data[0]);
        }
        this.done++;
      } while (this.done < Math.min(train, limit) && performance.now() < until);
      const curves = Object.entries(this.curves).map(([name, data]) => [name, { shape: [data.length], data }]);
      this.show({ ...outputs, ...Object.fromEntries(curves) });
      this.querySelector(".buttons output").value = `${this.done} of ${train} steps`;
      if (this.done >= Math.min(train, limit)) this.stop();
      else requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
  }
}

customElements.define("live-figure", LiveFigure);
