// Live figures. The controls give the inputs, the snippet's own graph computes, and what
// was drawn when the site was built is drawn anew.

import { draw, ids, words } from "./draw.js";

// An emptied field counts as 0, as does a pixel that is off.
const read = (input) => input.selectedIndex ?? (input.type === "checkbox" ? input.checked : input.valueAsNumber || 0);

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
    this.drawn = [];
    this.initial = () =>
      Object.fromEntries(Object.entries(spec.state).map(([name, t]) => [name, unpack(t)]));
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
    for (const element of this.querySelectorAll("[data-input]")) {
      const name = element.dataset.input, { shape, dtype, known } = this.spec.controls[name];
      const inputs = [...element.querySelectorAll("input, select")], shown = element.querySelector(".value");
      if (shown) shown.textContent = inputs[0].value;
      if (known) this.words[name] = words(inputs[0].value, ...shape);
      given[name] = { shape, dtype, data: Float32Array.from(known ? ids(this.words[name], known) : inputs.map(read)) };
    }
    return given;
  }

  update() {
    this.show(this.graph.run(this.read()));
  }

  show(outputs) {
    this.querySelectorAll(".view").forEach((element, n) => {
      const drawn = draw(this.spec.views[n], outputs, this.words);
      if (this.drawn[n] !== drawn) element.innerHTML = this.drawn[n] = drawn;
    });
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
        outputs = this.graph.run({ ...inputs, ...this.state });
        for (const name in this.state) this.state[name] = outputs[name];
        for (const name in outputs) {
          if (!outputs[name].shape.length) (this.curves[name] ??= []).push(outputs[name].data[0]);
        }
        this.done++;
      } while (this.done < Math.min(train, limit) && performance.now() < until);
      for (const name in this.curves) outputs[name] = { data: this.curves[name] };
      this.show(outputs);
      this.querySelector(".buttons output").value = `${this.done} of ${train} steps`;
      if (this.done >= Math.min(train, limit)) this.stop();
      else requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
  }
}

customElements.define("live-figure", LiveFigure);
